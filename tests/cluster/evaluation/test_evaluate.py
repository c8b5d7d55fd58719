"""What the driver of an evaluation holds; tests/jobs/test_evaluate.py has what it says."""

import gc
import shutil
from pathlib import Path

import pytest

from cluster.evaluation.evaluate import evaluate
from cluster.runs.saved import open_run
from cluster.runtime.tasks import map_tasks
from reactdiff.metrics.partial import PartialScores


def parts_alive() -> int:
    """Parts that somebody in this process holds."""
    gc.collect()
    return sum(type(one) is PartialScores for one in gc.get_objects())


@pytest.mark.usefixtures("local_ray")
def test_the_driver_holds_no_part_while_parts_are_scored(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 parts two are scored; the others are there, and only counted."""
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    for row in ("mimic", "oracle"):
        next((tmp_path / "store/runs/tiny/evaluation").glob(f"*/{row}-0*.npz")).unlink()
    run = open_run(str(tmp_path / "store/runs/tiny"), "")
    before, alive, asked = parts_alive(), [], []

    def recorded(function, calls, *arguments, **named):
        asked.extend(calls)
        return map_tasks(function, calls, *arguments, **named)

    monkeypatch.setattr("cluster.evaluation.evaluate.map_tasks", recorded)
    scores = evaluate(run.experiment, run.store, run.latents(), run.diffusion(), lambda done, of: alive.append((done, of, parts_alive())))
    assert [(done, of) for done, of, _ in alive] == [(done, 40) for done in range(1, 41)] and len(scores) == 20
    assert [row for row, _ in asked] == ["mimic", "oracle"], "no task is started for a part that is there"
    assert max(count for _, _, count in alive) == before
