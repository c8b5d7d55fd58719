"""jobs/train.py, tune.py and retrain.py in one process: driver, rank, tasks and trials one after the other, without Ray.

What they write, and in which order, is then the same each time.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.config.schema import Workers
from cluster.data import prepare
from cluster.driver import run
from cluster.evaluation import evaluate
from cluster.runs import build_latents, checkpoint_writer, inventory, lease, logs
from cluster.runs.lineage import open_attempt
from cluster.runtime.ray_cluster import Resources
from cluster.studies import trial, tuner
from cluster.studies.search import Search
from cluster.studies.trial import run_trial
from cluster.studies.tuner import Show, Undone
from cluster.telemetry import books_log
from cluster.training.job import Job, Place
from cluster.training.loop import train
from jobs import prepare as prepare_job
from tests.cluster.support.interleaving import Inline

NEVER = 1e6
"""Seconds."""


@contextmanager
def one_process() -> Iterator[None]:
    """Until the end of the block, this process is all there is, and each command it gives that of a new driver: the one before is dead."""
    with pytest.MonkeyPatch.context() as patch, _group_of_one():
        for module in (run, tuner, prepare_job):
            patch.setattr(module, "connect", lambda *_, **__: Resources(1, 0, 1))
        patch.setattr(prepare_job, "assert_visible", lambda *_: None)
        for name in ("assert_visible", "assert_possible", "driver_risk"):
            patch.setattr(run, name, lambda *_: None)
        patch.setattr(run, "this_job", lambda: ("no session", "no job"))
        patch.setattr(run, "ended_at", lambda *_: None)
        patch.setattr(run, "launch", _launch)
        patch.setattr(tuner, "assert_possible", lambda *_: None)
        patch.setattr(tuner, "nodes", list)
        patch.setattr(tuner, "gangs_at_once", lambda *_: 1)
        patch.setattr(tuner, "tune_trials", _tune_trials)
        patch.setattr(trial, "Poller", _Asked)
        for module in (build_latents, evaluate, prepare):
            patch.setattr(module, "map_tasks", _map_tasks)
        patch.setattr(checkpoint_writer, "ThreadPoolExecutor", lambda *_, **__: Inline())
        patch.setattr(inventory, "parallel_map", map)
        for module in (lease, books_log, logs):
            patch.setattr(module, "BEAT" if module is lease else "EVERY", NEVER)
        patch.setattr(lease, "LAPSE", NEVER)
        patch.setattr(lease, "_started", _started)
        yield


@contextmanager
def _group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


_lease_started, _starts = lease._started, iter(range(10**9))


def _started(pid: int) -> str:
    """Another time at each question: who holds a lease is told from who asks later, so it is gone."""
    return f"{_lease_started(pid)} {next(_starts)}"


def _launch(job: Job, *_: Any) -> dict[str, Any]:
    job = replace(job, attempt=open_attempt(job.run, job.life))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed insists
        return train(job, Place(0, 1, torch.device("cpu")), lambda _: None)


def _map_tasks(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], _: Workers, shared: Any = None, account: Any = None
) -> Iterator[tuple[int, Any]]:
    shared = pickle.loads(pickle.dumps(shared))
    for number, call in enumerate(calls):
        yield number, function(shared, *call)


class _Asked:
    """A poller that asks when it is asked."""

    def __init__(self, ask: Callable[[], str], _: float):
        self.answer = ask


def _tune_trials(search: Search, _: object, show: Show, *_others: object) -> dict[int, Undone]:
    while (number := search.next(())) is not None:
        run_trial(search.opened, number, lambda _: search.refresh())
        search.refresh()
        show(search, {})
    return {}
