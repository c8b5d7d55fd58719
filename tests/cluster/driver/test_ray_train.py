"""What Ray Train is told to do about ranks that failed."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from cluster.config.schema import Experiment, Workers
from cluster.driver import ray_train
from cluster.driver.board import Board
from cluster.driver.ray_train import Fit, _AskDriver
from cluster.driver.watchdog import PHASE_LIMITS, START
from cluster.runs.state import open_life
from cluster.runtime.placement import Gang
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


def test_a_rank_on_a_gpu_says_itself_how_cuda_failed_before_nccl_s_watchdog_ends_it() -> None:
    told = "TORCH_NCCL_RETHROW_CUDA_ERRORS"
    assert ray_train.rank_environment(Workers(gpu=True))[told] == "0" and told not in ray_train.rank_environment(Workers())


def eventually(what: Callable[[], bool]) -> None:
    """Wait for something that takes seconds, a minute at most."""
    assert any(what() or time.sleep(0.1) for _ in range(600))


@pytest.mark.starts
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train asks for the context of Ray's datasets, which asks itself for more
@pytest.mark.parametrize("answers", [True, False])
def test_who_leaves_while_ranks_train_ends_them_and_waits_for_ray_train_no_more(
    asked: tuple[_AskDriver, Any, Job], answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is inside Ray when Python ends was seen to crash it, after all was said and kept."""
    job = replace(asked[2], experiment=Experiment(workers=Workers(count=1)))
    trains = tmp_path / "trains"
    monkeypatch.setattr(ray_train, "_rank", lambda _: (trains.write_text(str(os.getpid())), time.sleep(3600)))
    monkeypatch.setattr(ray_train, "ABORTING", 10.0 if answers else 2.0)
    ray_train.set_defaults()
    here = ray.get_runtime_context().get_node_id()
    fit = Fit(job, Gang(1, 1, {"CPU": 1.0}), [here], asked[1], str(tmp_path))
    fit.start()
    eventually(lambda: trains.exists() and trains.read_text() != "")
    (controller,) = (one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::TrainController"))
    assert ray_train.SETTINGS.items() <= controller.environ().items()
    if not answers:
        controller.suspend()
    fit.end()
    assert not fit.is_alive() and isinstance(fit.error, RayActorError)
    eventually(lambda: not psutil.pid_exists(int(trains.read_text())))
