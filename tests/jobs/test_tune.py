"""jobs/tune.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.loading import load
from cluster.driver.pin import pin
from cluster.runs.state import newest_life
from cluster.storage import open_store
from cluster.studies.tuner import Undone
from jobs import tune
from tests.cluster.support.sweeps import rung, search_in
from tests.tiny import ROOT, call, job, settings

SHIPPED = ROOT / "jobs/configs/sweep.yaml"


def arguments(every_split: Path, store: Path) -> list[str]:
    return [*settings(every_split / "shards", store), "workers.count=1"]


def states(store: Path) -> dict[str, str]:
    """The status of every run of a store."""
    return {path.parent.name: json.loads(path.read_text())["status"] for path in (store / "runs").glob("*/state.json")}


def lives(store: Path) -> dict[str, int]:
    """How often the driver of every run was started."""
    return {path.name: newest_life(open_store(str(path))) for path in (store / "runs").iterdir()}


def ledger(store: Path, name: str) -> dict[str, bytes]:
    """The records of the only ledger of a sweep, by key."""
    (folder,) = (store / "sweeps" / name / "ledger").iterdir()
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json"))}


def ends(store: Path, name: str) -> list[dict[str, Any]]:
    """How its trials ended, in the order of their numbers."""
    return [json.loads(data) for key, data in ledger(store, name).items() if key.endswith("/end.json")]


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.ci
def test_sweep_trains_every_trial_shares_latents_and_leaves_the_best_as_a_configuration(every_split: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "store", tmp_path / "sweep.yaml"
    config.write_text("name: two\nspace: {diffusion.schedule: [cosine, linear]}\nmetrics: {FRDist: min}")
    command = ["--config", config, *arguments(every_split, store)]
    first = call("tune", *command)
    assert "2 trials, 0 of them done" in first.stdout and "share of the variance" not in first.stdout, "two trials say nothing of that"
    (shared,) = [run for run in states(store) if "autoencoder" in run]
    assert states(store).pop(shared) == "STOPPED", "it is asked for no more than its autoencoder and latents"
    assert sorted(states(store).values()) == ["DONE", "DONE", "STOPPED"]
    assert len(list((store / "latents").iterdir())) == 1, "both trials have the same autoencoder, so they share its latents"
    exports = {json.loads(path.read_text())["hash"] for path in (store / "runs").glob("*/exports/autoencoder/*.json")}
    assert len(exports) == 1 and not list((store / "runs").glob("two-????????/checkpoints/autoencoder/*")), "trained once"
    records = [json.loads(data) for key, data in ledger(store, "two").items() if key.endswith("/trial.json")]
    number = min(range(2), key=lambda number: ends(store, "two")[number]["scores"]["FRDist"])
    assert {"FRCorr", "FRDist_per_prediction", "EnergyScore"} <= ends(store, "two")[number]["scores"].keys()
    chosen = yaml.safe_load((store / "sweeps/two/best.yaml").read_text())
    winner = records[number]
    assert (chosen["run"]["name"], chosen["diffusion"]["schedule"]) == (winner["run"], winner["point"]["diffusion.schedule"])
    assert chosen["evaluation"]["split"] == "test", "the winner is reported on another split than it was chosen on"
    again = call("tune", *command)
    assert "2 trials, 2 of them done" in again.stdout
    assert {life for run, life in lives(store).items() if run != shared} == {1}, "who waited for the autoencoder may have opened its run"
    assert not pin(load(store / "sweeps/two/best.yaml"), "best").fresh, "jobs/train.py goes on with the winner's run"


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_a_halved_sweep_decides_alike_however_many_trials_run_at_a_time_and_after_a_kill(every_split: Path, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "name: half\nspace: {optim.lr.diffusion: [1.0e-2, 1.0e-9, 1.0e-8]}\nmetrics: {FRDist: min}\n"
        "halving: {rungs: [6], error: 0.3, clips: 4}\nsearch: grid\n"
    )
    more = ("optim.ema=0", "optim.epochs={autoencoder: 1, diffusion: 12}")
    found = {}
    for name, concurrent in (("one", 1), ("three", 3)):
        store, file = tmp_path / name, tmp_path / f"{name}.yaml"
        file.write_text(config.read_text() + f"concurrent: {concurrent}\n")
        command = [str(text) for text in ("--config", file, *arguments(every_split, store), *more)]
        if concurrent > 1:
            driver = subprocess.Popen([sys.executable, ROOT / "jobs/tune.py", *command], start_new_session=True)
            try:
                deadline = time.monotonic() + 900
                while not list(store.glob("sweeps/half/ledger/*/*/rung-0.json")):
                    assert driver.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
                    time.sleep(0.1)
            finally:
                os.kill(driver.pid, signal.SIGKILL)
                driver.wait()
        said = job("tune", *command).stdout
        assert all(f"trial {number} is stopped at rung 1: trial 0 is better" in said for number in (1, 2)), said
        assert "times below unpaired" in said and "nearest steps" in said
        found[name] = {key: data for key, data in ledger(store, "half").items() if not key.endswith("/end.json")}
        exports = [json.loads(path.read_text())["hash"] for path in (store / "runs").glob("half-????????/exports/diffusion/*.json")]
        found[f"{name} weights"] = exports[:1]
    assert found["one"] == found["three"] and found["one weights"] == found["three weights"]


def test_a_dry_run_lists_the_trials_and_starts_nothing(every_split: Path, tmp_path: Path) -> None:
    done = call("tune", "--dry-run", *settings(every_split / "shards", tmp_path / "store"))
    assert done.stdout.count("PENDING") == 4 and done.stdout.count("demo-sweep-") == 4
    assert not (tmp_path / "store").exists()


def test_a_trial_that_is_stopped_and_has_not_heard_of_it_is_no_trial_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = search_in(tmp_path)
    for number, worse in enumerate((0.0, 0.05, 0.05)):
        search.ledger.enter_rung(number, 0, rung(12, worse))
    search.refresh()
    assert tune.report(search, {2: Undone("its machine is gone", 75), 1: Undone("a mistake", 1)}) == 75
    assert f"error: 1 of 3 trials are not done (0: {search.ledger.trials[0].run})" in capsys.readouterr().err
    search.ledger.enter_end(0, "DONE", scores={"FRDist": 1.0})
    search.refresh()
    assert search.unfinished() == [1, 2] and tune.report(search, {2: Undone("its machine is gone", 75)}) == 0


def test_a_sweep_without_any_score_needs_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = search_in(tmp_path, halving=None)
    for number in range(3):
        search.ledger.enter_end(number, "DONE", scores={"FRDist": None})
    search.refresh()
    assert tune.report(search, {}) == 1 and "no trial of sweep shown has a defined FRDist" in capsys.readouterr().err


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: x\nspace: {diffusion.shedule: [cosine]}")
    done = call("tune", "--config", tmp_path / "sweep.yaml", f"run.store={tmp_path}/store", check=False)
    assert done.returncode == 1 and "did you mean diffusion.schedule?" in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_sweep_goes_on_with_the_same_command(every_split: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [str(text) for text in ("--config", SHIPPED, *arguments(every_split, store))]
    driver = subprocess.Popen([sys.executable, ROOT / "jobs/tune.py", *command], start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while sorted(state for run, state in states(store).items() if "autoencoder" not in run) != ["DONE", "RUNNING"]:
            assert driver.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
            time.sleep(0.2)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = states(store)
    done = job("tune", *command)
    assert "4 trials, 1 of them done" in done.stdout
    trials = [run for run in states(store) if "autoencoder" not in run]
    assert [states(store)[run] for run in trials] == ["DONE"] * 4
    assert sorted(lives(store)[run] for run in trials) == [1, 1, 1, 2], f"only the one that was running is started again; before: {before}"
    assert len(states(store)) == 6, "trials of equal depth share an autoencoder"
    assert (store / "sweeps/demo-sweep/best.yaml").exists()
