"""jobs/retrain.py as a scheduler runs it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs.conftest import pack
from tests.tiny import job, settings


def config(folder: Path, rule: str = "{}") -> Path:
    (folder / "retrain.yaml").write_text(f"name: faces\nrule: {rule}")
    return folder / "retrain.yaml"


@pytest.mark.timeout(1200)
def test_a_grown_dataset_brings_a_candidate_that_the_gate_judges_on_the_champion_s_clips(every_split: Path, tmp_path: Path) -> None:
    store, registry = tmp_path / "store", tmp_path / "store/registry/faces"
    for part in ("tree", "shards"):
        shutil.copytree(every_split / part, tmp_path / part)
    command = ["--config", config(tmp_path), *settings(tmp_path / "shards", store), "workers.count=1"]

    assert "decision 1: promoted, there was no champion" in job("retrain", *command).stdout
    first = json.loads((registry / "champion.json").read_text())
    assert first["run"] == f"faces-{first['manifest'][:8]}"
    assert "nothing new: decision 1" in job("retrain", *command).stdout

    pack(tmp_path, train=10)
    config(tmp_path, "{margin: 1000}")  # no candidate is that much better
    job("retrain", *command)
    second = json.loads((registry / "decisions/000002.json").read_text())
    assert (second["outcome"], second["before"]["run"], second["champion"]["run"]) == ("kept", first["run"], first["run"])
    assert second["candidate"]["manifest"] != first["manifest"]
    assert second["compared"]["split"] == "gate" and second["compared"]["clips"] == 4
    assert {"FRCorr", "FRDist"} <= second["compared"]["candidate"].keys() & second["compared"]["champion"].keys()
    assert json.loads((registry / "champion.json").read_text()) == {**first, "decision": 2}
    assert "nothing new: decision 2" in job("retrain", *command).stdout


def test_a_dataset_without_a_gate_is_refused_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    done = job("retrain", "--config", config(tmp_path), *settings(shards, tmp_path / "store"), check=False)
    assert done.returncode == 1 and "has no split gate" in done.stderr
    assert not (tmp_path / "store/runs").exists()


def test_there_is_nothing_to_roll_back_to_at_first(tmp_path: Path) -> None:
    done = job("retrain", "--config", config(tmp_path), "--rollback", f"run.store={tmp_path}/store", check=False)
    assert done.returncode == 1 and "no champion before the present one" in done.stderr
