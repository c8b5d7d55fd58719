"""One stage on Ray Train: a worker group that is started, watched, and started again where the failure table says so."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Workers
from cluster.runtime.failures import StageFailed, classify
from cluster.telemetry.meter import Snapshot
from cluster.training.loop import Job, Place, train

log = logging.getLogger(__name__)

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nobody here asks for what this actor would see; and whenever it starts, Ray's core prints an error about its arguments.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Settings that Ray Train takes from the driver's environment to its controller; who has set one keeps it."""


@ray.remote(num_cpus=0)
class Board:
    """Where ranks leave their latest numbers and the driver takes them."""

    def __init__(self) -> None:
        self._latest: dict[str, Snapshot] = {}

    def post(self, snapshot: Snapshot) -> None:
        """Leave a rank's numbers; its later ones replace them."""
        self._latest[snapshot["process"]] = snapshot

    def take(self) -> list[Snapshot]:
        """Take what was left since the last call."""
        taken, self._latest = list(self._latest.values()), {}
        return taken


def launch(job: Job, take: Callable[[Snapshot], None], on_restart: Callable[[str], None], notes: str) -> dict[str, Any]:
    """Train one stage on a group of Ray workers.

    Args:
        job: what every rank does.
        take: takes the ranks' numbers while they train.
        on_restart: told the failure class each time the group is started again.
        notes: URL Ray Train keeps its own notes under, visible to every node.

    Returns:
        What rank 0's `train` returned.

    Raises:
        StageFailed: if a failure is of a class that is not retried, or its budget is spent.
    """
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # else it may land on the head, or on spot
    board = Board.options(scheduling_strategy=beside).remote()  # type: ignore[attr-defined]
    spent: dict[str, int] = {}
    with _Polling(board, take):
        while True:
            try:
                return _fit(job, board, notes)
            except WorkerGroupError as error:
                failure, cause = classify(error.worker_failures.values())
                spent[failure.name] = spent.get(failure.name, 0) + 1
                failed = StageFailed(job.stage, failure, cause)
                if not failure.retried or spent[failure.name] > job.experiment.run.retries:
                    raise failed from cause
                log.warning("%s; starting the workers again (%d of %d)", failed, spent[failure.name], job.experiment.run.retries)
                on_restart(failure.name)
                job = replace(job, attempt=job.attempt + 1)


def scaling(workers: Workers) -> ScalingConfig:
    """The worker group a run asks Ray for."""
    return ScalingConfig(num_workers=workers.count, use_gpu=workers.gpu, resources_per_worker=bundle(workers))


def bundle(workers: Workers) -> dict[str, float]:
    """The resources of one rank."""
    return {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpu else {})}


def _fit(job: Job, board: Any, notes: str) -> dict[str, Any]:
    trainer = TorchTrainer(
        _rank,  # type: ignore[arg-type]
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if job.experiment.workers.gpu else "gloo"),
        scaling_config=scaling(job.experiment.workers),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{job.stage}-{job.life}-{job.attempt}",
            storage_path=notes,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": worker_environment(job.experiment.workers)},
        ),
    )
    return trainer.fit().return_value  # type: ignore[attr-defined]


def worker_environment(workers: Workers) -> dict[str, str]:
    """What a rank's process needs before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(workers.threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger",  # DeepSpeed's, at every collective
    }


def _rank(config: dict[str, Any]) -> dict[str, Any]:
    context, board = ray.train.get_context(), config["board"]
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    return train(config["job"], place, board.post.remote)


class _Polling:
    """Hand the board's numbers to `take` twice a second, in a thread, until the block ends."""

    def __init__(self, board: Any, take: Callable[[Snapshot], None]):
        self._board, self._take, self._done = board, take, Event()
        self._thread = Thread(target=self._repeat, name="poll", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._poll()

    def _repeat(self) -> None:
        while not self._done.wait(0.5):
            self._poll()

    def _poll(self) -> None:
        try:
            snapshots = ray.get(self._board.take.remote())
        except RayError:
            return  # Ray is ending; numbers to look at are not worth an error beside the real one
        for snapshot in snapshots:
            self._take(snapshot)
