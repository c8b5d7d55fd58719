"""A sweep's driver is killed again and again, and the same command given: what it decides and trains is what it would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import every_split  # noqa: F401
from tests.jobs.test_tune import arguments, ledger
from tests.tiny import ROOT, job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

KILLS, TRIALS = 10, 4
LONGEST = 6.0
"""Seconds that a driver is left at most, once it has written something."""

SWEEP = """
name: killed
space: {optim.lr.diffusion: [1.0e-2, 1.0e-9], diffusion.schedule: [cosine, linear]}
metrics: {FRDist: min}
halving: {rungs: [12, 120], error: 0.4, clips: 4}
concurrent: 2
"""
MORE = ("optim.epochs={autoencoder: 6, diffusion: 24}", "run.checkpoint_every=24", "evaluation.baselines=false")


def decided(store: Path) -> dict[str, bytes]:
    """Which trials there are, and what was decided about them."""
    return {key: data for key, data in ledger(store, "killed").items() if key.endswith("/trial.json") or "/choice-" in key}


def measured(store: Path) -> dict[str, bytes]:
    """Errors at rungs, also of trials that had got further before it was decided that they should not have."""
    return {key: data for key, data in ledger(store, "killed").items() if "/rung-" in key}


def finished(store: Path) -> set[str]:
    """Runs of the trials that came to their end and were not stopped: the same ones in every order."""
    records = {key: json.loads(data) for key, data in ledger(store, "killed").items()}
    stopped = {key.partition("/")[0] for key, choice in records.items() if "/choice-" in key and not choice["goes_on"]}
    done = {key.partition("/")[0] for key, end in records.items() if key.endswith("/end.json") and end["end"] == "DONE"}
    return {records[f"{number}/trial.json"]["run"] for number in done - stopped}


def ledger_ends(store: Path) -> list[str]:
    return [key for key in ledger(store, "killed") if key.endswith("/end.json")] if list(store.glob("sweeps/killed/ledger/*")) else []


def weights(store: Path) -> dict[str, str]:
    """Run and stage -> content hash of the weights, of what came to its end."""
    exports = sorted((store / "runs").glob("*/exports/*/*.json"))
    return {str(path.parent.relative_to(store)): json.loads(path.read_text())["hash"] for path in exports}


def written_since(store: Path, began: float) -> bool:
    """Whether a driver that was started then has put anything into the store."""
    for path in store.rglob("*.json"):
        try:
            if path.stat().st_mtime > began:
                return True
        except FileNotFoundError:  # it was deleted meanwhile
            continue
    return False


def test_a_sweep_whose_driver_is_killed_at_ten_moments_decides_and_trains_as_if_nothing_had_happened(
    every_split: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    file, chance = tmp_path / "sweep.yaml", random.Random(0)
    file.write_text(SWEEP)

    def command(store: Path) -> list[str]:
        return [str(text) for text in ("--config", file, *arguments(every_split, store), *MORE)]

    job("tune", *command(tmp_path / "whole"))
    store = tmp_path / "disturbed"
    for number in range(KILLS):
        began = time.time()
        driver = subprocess.Popen([sys.executable, ROOT / "jobs/tune.py", *command(store)], stdout=subprocess.DEVNULL)
        while not written_since(store, began):
            assert driver.poll() is None, f"the sweep ended before kill {number}"
            time.sleep(0.05)
        time.sleep(chance.uniform(0, LONGEST))
        assert driver.poll() is None, f"the sweep ended before kill {number}"
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert len(ledger_ends(store)) < TRIALS, "there was something left to do"
    job("tune", *command(store))
    whole = tmp_path / "whole"
    assert decided(store) == decided(whole) and sum("/choice-" in key for key in decided(whole)) >= TRIALS
    assert finished(whole) == finished(store) != set()
    denoisers = {f"runs/{run}/exports/diffusion" for run in finished(whole)}
    first_rungs = {f"{number:06d}/rung-0.json" for number in range(TRIALS)}
    for of, least in ((weights, denoisers), (measured, first_rungs)):
        one, other = of(whole), of(store)
        assert one.keys() & other.keys() >= least, "what both have is compared"
        assert {key: one[key] for key in one.keys() & other.keys()} == {key: other[key] for key in one.keys() & other.keys()}
    best = [(each / "sweeps/killed/best.yaml").read_text().replace(str(each), "") for each in (whole, store)]
    assert best[0] == best[1]
