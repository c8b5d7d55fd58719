"""What the driver of an evaluation holds; tests/jobs/test_evaluate.py has what it says."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.evaluation.evaluate import _score, evaluate
from cluster.runs.saved import open_run
from cluster.runtime.tasks import map_tasks
from reactdiff.metrics import agreement, dtw, energy, frechet, roughness, synchrony
from reactdiff.metrics.dtw import FRAMES
from reactdiff.metrics.partial import PartialScores


def parts_alive() -> int:
    """Parts that somebody in this process holds."""
    gc.collect()
    return sum(type(one) is PartialScores for one in gc.get_objects())


@pytest.mark.usefixtures("local_ray")
def test_the_driver_holds_no_part_while_parts_are_scored(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 42 parts two are scored; the others are there, and only counted."""
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
    assert [(done, of) for done, of, _ in alive] == [(done, 42) for done in range(1, 43)] and len(scores) == 21
    assert [row for row, _ in asked] == ["mimic", "oracle"], "no task is started for a part that is there"
    assert max(count for _, _, count in alive) == before


def counted(task: Any, row: str, start: int) -> tuple[int, bool, int, int]:
    """Score a part; this process, whether it had opened what rows are made of, and how many kernels it has compiled and loaded so far."""
    opened = "inputs" in vars(task)
    _score(task, row, start)
    kernels = [agreement._laid_out, agreement._concordance, synchrony._correlations]
    kernels += [energy._mean_distances, roughness._steps, frechet._scatter]
    kernels += [dtw._kernel(group.stop - group.start, dtw._pitch(FRAMES)) for group, _ in dtw.GROUPS]
    compiled, loaded = ([sum(getattr(one.stats, kind).values()) for one in kernels] for kind in ("cache_misses", "cache_hits"))
    return os.getpid(), opened, sum(compiled), sum(loaded)


@pytest.mark.usefixtures("local_ray")
def test_a_process_is_started_opened_and_compiled_for_once_whatever_the_number_of_parts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    for path in (tmp_path / "store/runs/tiny/evaluation").glob("*/*.npz"):
        path.unlink()
    run, found = open_run(str(tmp_path / "store/runs/tiny"), ""), list[tuple[int, bool, int, int]]()

    def recorded(function, calls, *arguments, **named):
        for number, result in map_tasks(counted, calls, *arguments, **named):
            found.append(result)
            yield number, None

    monkeypatch.setattr("cluster.evaluation.evaluate.map_tasks", recorded)
    evaluate(run.experiment, run.store, run.latents(), run.diffusion(), lambda done, of: None)
    processes = {process for process, _, _, _ in found}
    slots = int(ray.cluster_resources()["CPU"] / run.experiment.workers.cpus)
    assert len(found) == 42 and len(processes) <= slots < len(found)
    assert sum(not opened for _, opened, _, _ in found) == len(processes), "models and ground truth are opened once in each"
    counts = {process: (compiled, loaded) for process, _, compiled, loaded in found}
    assert len({(process, compiled, loaded) for process, _, compiled, loaded in found}) == len(processes), "nothing later"
    assert all(compiled + loaded == 9 for compiled, loaded in counts.values())
    assert sum(compiled for compiled, _ in counts.values()) <= 9, "one of them at most: the others load what it has made"
