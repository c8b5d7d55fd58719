"""What Ray Train is told to do about ranks that failed."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from cluster.config.schema import Experiment
from cluster.driver import ray_train
from cluster.driver.board import Board
from cluster.driver.ray_train import _AskDriver
from cluster.driver.watchdog import PHASE_LIMITS, START
from cluster.runs.state import open_life
from cluster.storage import open_store
from cluster.training.job import Job
from cluster.training.requests import Request


@pytest.fixture
def asked(local_ray: object, tmp_path: Path) -> tuple[_AskDriver, Any, Job]:
    """Who asks, for life 1 of a run, and the board on which the driver answers."""
    run, board = open_store(str(tmp_path)), Board.remote()
    job = Job(Experiment(), "autoencoder", run, open_life(run, {}), run, "")
    return _AskDriver(job, board), board, job


FAILED = WorkerGroupError("a rank failed", {0: RuntimeError("it did")})


@pytest.mark.parametrize(("again", "decision"), [(True, FailureDecision.RETRY), (False, FailureDecision.RAISE)])
def test_the_driver_decides(asked: tuple[_AskDriver, Any, Job], again: bool, decision: FailureDecision) -> None:
    policy, board, _ = asked

    def drive() -> None:
        while ray.get(board.take.remote(Request.NOTHING))[1] is None:
            time.sleep(0.01)
        ray.get(board.decide.remote(again))

    with ThreadPoolExecutor(1) as driver:
        driver.submit(drive)
        assert policy.make_decision(FAILED) == decision


def test_a_driver_that_stands_still_is_not_waited_for_once_another_has_begun_a_newer_life(asked: tuple[_AskDriver, Any, Job]) -> None:
    policy, _, job = asked
    open_life(job.run, {})
    assert policy.make_decision(FAILED) == FailureDecision.RAISE


def test_peers_are_waited_for_longer_than_the_watchdog_waits_for_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "_Trainer", lambda job, board, **given: given)
    job: Any = SimpleNamespace(experiment=Experiment(), stage="autoencoder", life=1, attempt=0)
    given: Any = ray_train._trainer(job, ray_train.gang_of(job.experiment.workers), ["a node"], None, "notes")
    assert given["torch_config"].timeout_s > max(START, *PHASE_LIMITS.values())
