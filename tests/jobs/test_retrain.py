"""jobs/retrain.py as a scheduler runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import pack
from tests.tiny import call, settings


def config(folder: Path, rule: str = "{}") -> Path:
    (folder / "retrain.yaml").write_text(f"name: faces\nrule: {rule}")
    return folder / "retrain.yaml"


def command(folder: Path) -> list[str | Path]:
    return ["--config", folder / "retrain.yaml", *settings(folder / "shards", folder / "store"), "workers.count=1"]


def champion(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "store/registry/faces/champion.json").read_text())


@pytest.fixture(scope="module")
def ticked(every_split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree, its shards, and a store after a first tick; not to be changed, but to be copied."""
    folder = tmp_path_factory.mktemp("ticked")
    shutil.copytree(every_split, folder, dirs_exist_ok=True)
    config(folder)
    assert "decision 1: promoted, there was no champion" in call("retrain", *command(folder)).stdout
    return folder


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.ci
def test_first_tick_makes_a_champion_and_the_next_finds_nothing_new(ticked: Path) -> None:
    first = champion(ticked)
    assert first["run"] == f"faces-{first['manifest'][:8]}"
    assert json.loads((ticked / "store/runs" / first["run"] / "state.json").read_text())["status"] == "DONE"
    assert "nothing new: decision 1" in call("retrain", *command(ticked)).stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_grown_dataset_brings_a_candidate_that_the_gate_judges_on_the_champion_s_clips(ticked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ticked, tmp_path / "grown"))
    first = champion(folder)
    pack(folder, train=10)
    config(folder, "{margin: 1000}")  # no candidate is that much better
    call("retrain", *command(folder))
    second = json.loads((folder / "store/registry/faces/decisions/000002.json").read_text())
    assert (second["outcome"], second["before"]["run"], second["champion"]["run"]) == ("kept", first["run"], first["run"])
    assert second["candidate"]["manifest"] != first["manifest"]
    assert second["compared"]["split"] == "gate" and second["compared"]["clips"] == 4
    assert {"FRCorr", "EnergyScore"} <= second["compared"]["candidate"].keys() & second["compared"]["champion"].keys()
    assert champion(folder) == {**first, "decision": 2}
    assert "nothing new: decision 2" in call("retrain", *command(folder)).stdout


def test_a_dataset_without_a_gate_is_refused_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    done = call("retrain", "--config", config(tmp_path), *settings(shards, tmp_path / "store"), check=False)
    assert done.returncode == 1 and "has no split gate" in done.stderr
    assert not (tmp_path / "store/runs").exists()


def test_there_is_nothing_to_roll_back_to_at_first(tmp_path: Path) -> None:
    done = call("retrain", "--config", config(tmp_path), "--rollback", f"run.store={tmp_path}/store", check=False)
    assert done.returncode == 1 and "no champion before the present one" in done.stderr
