"""One stage's worker group as Ray Train runs it: ranks pinned to their machines, and every decision about a failure left to the driver.

What is private in Ray 2.56: the trainer's two methods through which its failure policy and its callbacks can be chosen, their base classes,
its controller and what that is started with, the callback that is left out, and where a worker group keeps its placement group.
"""

import dataclasses
import logging
import os
import time
from contextlib import suppress
from threading import Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray import cloudpickle
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import placement_group_table

from cluster.config.schema import Workers
from cluster.runs.lineage import assert_sees
from cluster.runs.state import poll_for_successor
from cluster.runtime.device import worker_environment
from cluster.runtime.nodes import NODE_ID
from cluster.runtime.placement import Gang
from cluster.telemetry.meter import Snapshot
from cluster.training.job import Job, Place
from cluster.training.loop import train
from cluster.training.requests import Request

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The place was free a moment ago: who does not get it waits again, and says so.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # Notices of machines that go are watched by the driver; and whenever this actor starts, Ray's core prints an error about its arguments.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Its controller asks blocking questions, as all of its callbacks do.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # Ranks that end leave their group first, and NCCL waits there for what waits for a rank that is gone.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
}
"""Settings of Ray Train's controller, from the driver's environment; who has set one keeps it."""

ATTEMPT = "REACTDIFF_ATTEMPT"
"""Variable of a rank's environment: the number of its attempt."""

GROUP_TIMEOUT = 2 * 3600
"""Seconds that a rank waits for its peers in a collective: longer than the watchdog lets any phase of theirs last, which says more."""

ASKED_EVERY = 0.05
"""Seconds between two looks whether the driver has decided."""

ABORTING = 10.0
"""Seconds that Ray Train's controller is given to end its ranks and itself at once, and half of that to be gone when it was killed."""


class Fit(Thread):
    """Ray Train's `fit` in a thread of its own: there it leaves SIGINT to us.

    Attributes:
        value: what rank 0's `train` returned.
        error: what ended it, if anything did.
    """

    def __init__(self, job: Job, gang: Gang, place: list[str], board: Any, notes: str):
        """Start nothing yet.

        Args:
            job: what every rank does.
            gang: what each needs.
            place: the machine of each.
            board: a `Board` that knows the attempt.
            notes: folder of this machine for Ray Train's own notes, of which nobody needs any. Only its controller, which is here, uses it,
                since no rank reports a checkpoint to it: in a bucket they would be written by Arrow's client, without our retries.
        """
        super().__init__(name="fit", daemon=True)
        self._trainer = _trainer(job, gang, place, board, notes)
        self.value: dict[str, Any] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train."""
        try:
            self.value = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except (TrainingFailedError, RayError) as error:
            # Its frames hold the handle of Ray Train's controller, which would live on, and hold the ranks' machines.
            error.__context__ = None
            self.error = error.with_traceback(None)
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        """End Ray Train's controller, its ranks and this thread, wherever they are: one that waits in Ray when Python ends can crash it."""
        for ask, seconds in ((self._trainer.abort, ABORTING), (self._trainer.kill, ABORTING / 2)):
            if self.is_alive():
                with suppress(RayError):
                    ask()
                self.join(seconds)


class _Start(WorkerGroupCallback, ControllerCallback):
    """In Ray Train's controller, before its own callbacks: an attempt's number, word of when places are held, an end of forgotten ranks.

    A group that fails while its ranks load is not known to Ray Train any more; its places would stay taken until the driver ends.
    """

    def __init__(self, board: Any):
        self._board = board
        self._state: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._board.asked.remote()

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._state = worker_group.get_worker_group_state()
        self._board.placed.remote(_placed_after(self._state.placement_group_handle.placement_group))
        worker_group.execute(_begin_attempt, ray.get(self._board.attempt.remote()))

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._state = None
        self._board.given_back.remote()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self.after_worker_group_shutdown(worker_group_context)

    async def before_controller_shutdown(self) -> None:
        if self._state is not None:
            self._state.shutdown()


def _placed_after(group: Any) -> float:
    """Seconds that Ray took to place a group."""
    return float(placement_group_table(group)["stats"]["end_to_end_creation_latency_ms"]) / 1000


def _begin_attempt(number: int) -> None:
    os.environ[ATTEMPT] = str(number)


class _AskDriver(FailurePolicy):
    """In Ray Train's controller: the driver decides, unless it stands still and another has begun a newer life."""

    def __init__(self, job: Job, board: Any):
        super().__init__(FailureConfig())
        self._job, self._board = job, board

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        successor = poll_for_successor(self._job.run, self._job.life)
        try:
            ray.get(self._board.failed.remote(cloudpickle.dumps(training_failed_error)))
            while (again := ray.get(self._board.decided.remote())) is None and not successor.answer():
                time.sleep(ASKED_EVERY)
        except RayError:  # the driver is gone, and the board with it
            again = False
        return FailureDecision.RETRY if again else FailureDecision.RAISE


class _Trainer(TorchTrainer):
    def __init__(self, job: Job, board: Any, **given: Any):
        super().__init__(_rank, train_loop_config={"job": job, "board": board}, **given)
        self._policy, self._start = _AskDriver(job, board), _Start(board)
        self._controller: Any = None

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        """As Ray Train's own does it, which tells nobody its handle of the controller, and passes on only some of SETTINGS."""
        here = {NODE_ID: ray.get_runtime_context().get_node_id()}
        settings = get_env_vars_to_propagate() | {name: os.environ[name] for name in SETTINGS}
        actor = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": settings})(TrainController)
        self._controller = actor.remote(**given | {"failure_policy": self._policy})
        try:
            ray.get(self._controller.run.remote())
            return ray.get(self._controller.get_result.remote())
        finally:
            self._controller = None

    def abort(self) -> None:
        """Have the controller end the ranks and itself, and give back their places."""
        if controller := self._controller:
            controller.abort.remote()

    def kill(self) -> None:
        """Kill the controller; Ray ends what it has started."""
        if controller := self._controller:
            ray.kill(controller)

    def _create_default_callbacks(self) -> list[Any]:
        """Without the actor of Ray's datasets: nobody reads one, and it takes a second to start beside the ranks."""
        usual = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, DatasetsCallback)]
        return [self._start, *usual]


def _trainer(job: Job, gang: Gang, place: list[str], board: Any, notes: str) -> _Trainer:
    workers = job.experiment.workers
    return _Trainer(
        job,
        board,
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo", timeout_s=GROUP_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=len(place),
            use_gpu=workers.gpu,
            resources_per_worker=gang.each(len(place)),
            label_selector=[{NODE_ID: node} for node in place],
        ),
        run_config=RunConfig(
            name=f"{job.stage}-{job.life}-{job.attempt}",
            storage_path=notes,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # tracebacks of what it tells the driver, too; its files have all
            worker_runtime_env={"env_vars": rank_environment(workers)},
        ),
    )


def gang_of(workers: Workers) -> Gang:
    """The ranks that a run asks Ray for."""
    resources = {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpu else {})}
    return Gang(workers.least, workers.most, resources, workers.per_host, workers.labels)


def rank_environment(workers: Workers) -> dict[str, str]:
    """What a rank's process needs: `worker_environment`, and silence about what DeepSpeed does at every collective.

    On a GPU, too, that NCCL's watchdog ends no process whose CUDA has failed: the rank itself says why, as a broken communicator does at
    the next collective.
    """
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger"}
    return worker_environment(workers) | quiet | ({"TORCH_NCCL_RETHROW_CUDA_ERRORS": "0"} if workers.gpu else {})


def set_defaults() -> None:
    """Give Ray Train SETTINGS, before it is used."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def _rank(config: dict[str, Any]) -> dict[str, Any]:
    context, board = ray.train.get_context(), config["board"]
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    job = dataclasses.replace(config["job"], attempt=int(os.environ[ATTEMPT]))

    def report(snapshot: Snapshot) -> Request:
        try:
            return ray.get(board.post.remote(job.attempt, snapshot), timeout=10)
        except RayError:
            return Request.NOTHING  # the driver is gone, or slow: it asks again

    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it prints the traceback of every rank, of which one says what happened
    assert_sees(job.run, job.life, job.attempt)
    return train(job, place, report)
