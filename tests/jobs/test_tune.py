"""jobs/tune.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.config.loading import load
from cluster.driver.pin import pin
from cluster.runs.state import newest_life
from cluster.storage import open_store
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


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_seeded_sweep_trains_every_trial_shares_latents_and_leaves_the_best_as_a_configuration(every_split: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "store", tmp_path / "sweep.yaml"
    config.write_text("name: two\ngrid: {diffusion.schedule: [cosine, linear]}\nmetric: FRDist\nmode: min")
    command = ["--config", config, *arguments(every_split, store)]
    first = call("tune", *command)
    assert "2 trials, 0 of them done" in first.stdout
    assert set(states(store).values()) == {"DONE"} and len(states(store)) == 2
    assert len(list((store / "latents").iterdir())) == 1, "both trials have the same autoencoder, so they share its latents"
    rows = json.loads((store / "sweeps/two/trials.json").read_text())
    winner = min(rows, key=lambda row: row["scores"]["FRDist"])
    chosen = yaml.safe_load((store / "sweeps/two/best.yaml").read_text())
    assert (chosen["run"]["name"], chosen["diffusion"]["schedule"]) == (winner["run"], winner["parameters"]["diffusion.schedule"])
    assert chosen["evaluation"]["split"] == "test", "the winner is reported on another split than it was chosen on"
    again = call("tune", *command)
    assert "2 trials, 2 of them done" in again.stdout and set(lives(store).values()) == {1}
    assert not pin(load(store / "sweeps/two/best.yaml"), "best").fresh, "jobs/train.py goes on with the winner's run"


def test_a_dry_run_lists_the_trials_and_starts_nothing(every_split: Path, tmp_path: Path) -> None:
    done = call("tune", "--dry-run", *settings(every_split / "shards", tmp_path / "store"))
    assert done.stdout.count("PENDING") == 4 and done.stdout.count("demo-sweep-") == 4
    assert not (tmp_path / "store").exists()


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: x\ngrid: {diffusion.shedule: [cosine]}")
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
        while sorted(states(store).values()) != ["DONE", "RUNNING"]:
            assert driver.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
            time.sleep(0.2)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = states(store)
    done = job("tune", *command)
    assert "4 trials, 1 of them done" in done.stdout
    assert set(states(store).values()) == {"DONE"} and len(states(store)) == 4
    assert sorted(lives(store).values()) == [1, 1, 1, 2], f"only the trial that was running is started again; before: {before}"
    assert (store / "sweeps/demo-sweep/best.yaml").exists()
