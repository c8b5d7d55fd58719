"""Ray Tune as it is, over trials that only pretend to train: it places what the ledger says, and keeps nothing that we need."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from cluster.data.manifest import File, Manifest, Split, StreamEntry, publish
from cluster.runtime.failures import TABLE, StageFailed
from cluster.runtime.ray_cluster import Resources
from cluster.storage import open_store
from cluster.studies import tuner
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep
from cluster.studies.tuner import run_sweep, tune_trials

RUNGS = [10, 20]


def pretend(config: dict[str, int], opened: OpenSweep) -> None:
    """A trial whose error is its number, that measures its rungs and waits for what is decided; number 2 fails once, and stays behind."""
    number, ledger = config["number"], opened.ledger
    (opened_once := opened.home).put(f"seen/{number}-{time.time_ns()}", b"")
    if number == 2 and len(list(opened_once.list("seen/2-"))) == 1:
        raise StageFailed("diffusion", next(failure for failure in TABLE if failure.name == "lost"), RuntimeError("the machine is gone"))
    for rung, items in enumerate(RUNGS):
        errors = [[number + item / 100 + number * (item % 3) / 1000] for item in range(16)]
        ledger.enter_rung(number, rung, {"progress": items, "levels": [[0.0, 0.0]], "errors": errors})
        tune.report({"trial": number, "rungs": rung + 1})
        if ledger.stopped(number, len(RUNGS)):
            ledger.enter_end(number, "STOPPED", "it is worse")
            return
    ledger.enter_end(number, "DONE", scores={"FRDist": float(number)})


@pytest.fixture
def opened(tmp_path: Path) -> OpenSweep:
    splits = {"train": Split(), "val": Split(appropriateness=File(file="val/matrix.npy", hash="0" * 32))}
    streams = [StreamEntry(name="mfcc", kind="acoustic", width=26)]
    manifest = Manifest(kind="clips", frames=100, streams=streams, targets={}, members=[], splits=splits)
    publish(open_store(f"{tmp_path}/shards"), manifest)
    given: dict[str, Any] = {
        "name": "pretended",
        "space": {"diffusion.schedule": ["cosine", "linear"], "optim.lr.diffusion": {"log_range": [1e-5, 1e-3]}},
        "search": "optuna",
        "trials": 4,
        "concurrent": 1,
        "metrics": {"FRDist": "min"},
        "halving": {"rungs": RUNGS, "clips": 8},
    }
    places = [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store", "model.facial=[]", "model.acoustic=[mfcc]"]
    return OpenSweep(Sweep.model_validate(given), places)


def test_tune_runs_what_the_ledger_says_and_the_same_again_runs_what_is_left(
    opened: OpenSweep, local_ray: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "_trial", pretend)
    shown: list[dict[int, str]] = []
    first = Search(opened)
    errors = tune_trials(first, 2, lambda search, states: shown.append(dict(states)))
    assert list(errors) == [2] and "the machine is gone" in errors[2]
    assert first.unfinished() == [2], "a trial that failed is not tried again by the same command, and what depends on it waits"
    assert {0: "RUNNING"} in shown
    again = Search(OpenSweep(opened.sweep, opened.overrides))
    assert tune_trials(again, 2, lambda *_: None) == {}
    assert again.over() and (best := again.best()) is not None and best.number == 0
    assert [again.ledger.trials[number].end for number in range(4)] == ["DONE", "STOPPED", "STOPPED", "STOPPED"]
    seen = [entry.key.split("/")[1].split("-")[0] for entry in opened.home.list("seen/")]
    assert sorted(seen) == ["0", "1", "2", "2", "3"]
    choice = json.loads(open_store(again.ledger.url).read("000003/choice-0.json"))
    assert (choice["goes_on"], choice["against"]) == (False, 0)


def test_trials_that_can_never_be_placed_are_an_error_before_any_of_them_is_suggested(opened: OpenSweep, local_ray: Resources) -> None:
    given = opened.sweep.model_copy(update={"halving": None, "search": "random"})
    with pytest.raises(ValueError, match=r"room for \d+ of 640 ranks"):
        run_sweep(given, [*opened.overrides, "workers.count=640"], print, lambda *_: None)
    assert [entry.key for entry in opened.store.list()] == ["lease.json"]
