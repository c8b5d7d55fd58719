"""One stage on Ray Train: a worker group that waits for its place, is watched, and is started again where the failure table says so."""

import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Workers
from cluster.driver.interruption import Interruption
from cluster.driver.watchdog import Hang, Watchdog
from cluster.runs.checkpoint import newest_progress
from cluster.runs.lineage import open_attempt
from cluster.runtime.failures import Budget, StageFailed, classify
from cluster.runtime.nodes import NODE_ID, draining_nodes, nodes
from cluster.runtime.placement import Demand, Gang, fit, wait_for_place
from cluster.runtime.postmortem import postmortem
from cluster.storage import StorageError
from cluster.telemetry.meter import Snapshot
from cluster.telemetry.monitor import StageMonitor
from cluster.training.loop import Job, Place, train
from cluster.training.requests import Request

log = logging.getLogger(__name__)

RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The place was free a moment ago: who does not get it waits again, and says so.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # Notices of machines that go are watched by the driver; and whenever this actor starts, Ray's core prints an error about its arguments.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Settings that Ray Train takes from the driver's environment to its controller; who has set one keeps it."""

POLL = 0.5
"""Seconds between two looks at a group that trains."""

REPORT = 1.0
"""Seconds between two reports of a rank."""

CLUSTER_POLL = 2.0
"""Seconds between two looks at the machines."""


@ray.remote(num_cpus=0)
class Board:
    """Where ranks leave their latest numbers, and find what the driver asks of them."""

    def __init__(self) -> None:
        self._latest: dict[str, Snapshot] = {}
        self._request = Request.NOTHING

    def post(self, snapshot: Snapshot) -> Request:
        """Leave a rank's numbers; its later ones replace them. Returns what is asked of it."""
        self._latest[snapshot["process"]] = snapshot
        return self._request

    def take(self, request: Request) -> list[Snapshot]:
        """Take what was left since the last call, and ask this from now on."""
        taken, self._latest, self._request = list(self._latest.values()), {}, request
        return taken


def launch(job: Job, monitor: StageMonitor, notes: str, assert_ours: Callable[[], None]) -> dict[str, Any]:
    """Train one stage on groups of Ray workers, one after the other, until it is at its end.

    Args:
        job: what every rank does.
        monitor: takes the ranks' numbers and what happens to the group.
        notes: URL Ray Train keeps its own notes under, visible to every node.
        assert_ours: raises once another driver has the run.

    Returns:
        What rank 0's `train` returned.

    Raises:
        StageFailed: if a failure is of a class that is not retried, or its budget is spent.
        ValueError: if there can never be room for the ranks.
        Superseded: if another driver has the run.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the ranks have written a checkpoint.
    """
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    run, gang = job.experiment.run, gang_of(job.experiment.workers)
    budget, furthest = Budget(run.retries), newest_progress(job.run, job.stage)
    with Interruption() as interruption:
        while True:
            group = None
            try:
                place = _place(gang, run.wait_minutes, monitor, interruption, assert_ours)
                job = replace(job, attempt=open_attempt(job.run, job.life))
                group = _Group(job, gang, place, monitor, interruption, assert_ours)
                result = group.train(notes)
            except (TrainingFailedError, RayError) as error:
                hang = group.hang if group else None
                failure, cause = classify([hang] if hang else getattr(error, "worker_failures", {0: error}).values())
                where = group.where(error, cause) if group else ""
                if (progress := newest_progress(job.run, job.stage)) > furthest:
                    furthest = progress
                    budget.refill()
                if interruption.signal:
                    interruption.end()
                allowed = budget.allows(failure)
                failed = StageFailed(job.stage, failure, cause, where, str(budget))
                if not allowed:
                    raise failed from cause
                monitor.restarted(failure.name, f"{failed.what}; starting the ranks again ({budget})")
            else:
                if not result["left"] and not interruption.signal:
                    return result
                if interruption.signal:  # also where the stage came to its end meanwhile: told to end is told to end
                    monitor.say(f"checkpoint at {result['progress']} items; the same command goes on from there")
                    interruption.end()
                monitor.restarted(group.reason, f"{group.why}: checkpoint at {result['progress']} items, starting the ranks again")


def gang_of(workers: Workers) -> Gang:
    """The ranks that a run asks Ray for."""
    resources = {"CPU": workers.cpus, **({"GPU": 1.0} if workers.gpu else {})}
    return Gang(workers.least, workers.most, resources, workers.per_host, workers.labels)


def _place(
    gang: Gang, minutes: float, monitor: StageMonitor, interruption: Interruption, assert_ours: Callable[[], None]
) -> list[str]:
    """The machine of each rank, when there is room."""

    def report(waited: float, text: str) -> None:
        assert_ours()
        if interruption.signal:  # nothing is lost, for nothing runs
            interruption.end()
        monitor.waiting(waited, text)

    place = wait_for_place(gang, 60 * minutes, report)
    monitor.placed()
    return place


class _Group:
    """One start of the ranks on these machines.

    Attributes:
        reason: the class of failure for which they were asked to leave.
        why: the same, in words.
        hang: why ranks were killed, if they were.
    """

    def __init__(
        self,
        job: Job,
        gang: Gang,
        place: list[str],
        monitor: StageMonitor,
        interruption: Interruption,
        assert_ours: Callable[[], None],
    ):
        self.reason, self.why = "", ""
        self.hang: Hang | None = None
        self._job, self._gang, self._place, self._monitor, self._interruption = job, gang, place, monitor, interruption
        self._assert_ours = assert_ours
        self._names = {node.id: f"{node.name} ({node.address})" for node in nodes()}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._growth: Demand | None = None
        self._looked = 0.0
        self._progress, self._heard = 0.0, dict[int, Snapshot]()
        self._watchdog = Watchdog(len(place), self._rank_name)
        if len(hosts := dict.fromkeys(place)) > 1:
            ranks = {host: [rank for rank, node in enumerate(place) if node == host] for host in hosts}
            monitor.say("ranks: " + ", ".join(f"{self._names.get(host, host)} {_span(of)}" for host, of in ranks.items()))
        elif len(place) < gang.most:
            monitor.say(f"{len(place)} of at most {gang.most} ranks; more start at a checkpoint when there is room for them")

    def train(self, notes: str) -> dict[str, Any]:
        """Bring the ranks to their end, or to the checkpoint at which they leave."""
        fit_thread = _Fit(_trainer(self._job, self._place, self._board, notes))
        fit_thread.start()
        try:
            while fit_thread.is_alive():
                fit_thread.join(POLL)
                self._look()
        finally:
            if self._growth:
                self._growth.remove()
        if fit_thread.error:
            raise fit_thread.error
        return fit_thread.value

    def where(self, error: BaseException, cause: BaseException) -> str:
        """Host, rank and progress of a failure, as far as they are known."""
        failures = getattr(error, "worker_failures", {})
        rank = next((rank for rank, one in failures.items() if one is cause), next(iter(failures), None))
        known = [f"at {self._progress:.0f} items"] if self._progress else []
        if rank is not None and rank < len(self._place):
            known = [f"rank {rank}", f"host {self._names.get(self._place[rank], self._place[rank])}", *known]
        return ", ".join(known)

    def _look(self) -> None:
        """Take the ranks' numbers, look at the machines, and ask what is to be asked."""
        self._assert_ours()
        if self._interruption.signal and self.reason != "interrupted":
            self.reason = "interrupted"
            self._monitor.say("told to end: a checkpoint at the next step, then the end; the second Ctrl-C ends at once")
        try:
            if not self.reason and time.monotonic() - self._looked >= CLUSTER_POLL:
                self._looked = time.monotonic()
                self._look_at_machines()
            snapshots = ray.get(self._board.take.remote(self._request()))
        except RayError:
            return  # Ray is ending; the ranks' own error says more
        for snapshot in snapshots:
            self._monitor.take(snapshot)
            self._watchdog.hear(snapshot)
            self._heard[snapshot["rank"]] = snapshot
            self._progress = max(self._progress, snapshot["gauges"].get("progress_items", 0))
        if self.hang is None:
            self._look_for_hang()

    def _look_for_hang(self) -> None:
        if said := self._watchdog.slow():
            self._monitor.say(said)
        if (stuck := self._watchdog.look()) is None:
            return
        folder = f"logs/{self._job.life:06d}.{self._job.attempt}"
        self.hang = Hang(f"{stuck.text}; stacks of all ranks are in {self._job.run.url}/{folder}/")
        self._monitor.say(f"{stuck.text}: writing the stacks of all ranks, then killing what hangs")
        with suppress(RayError):
            ray.get(self._board.take.remote(Request.STACKS))
        time.sleep(2 * REPORT)  # each rank reports once a second, and hears it then
        self._examine(folder, sorted(self._heard), kill=False)
        self._examine(folder, [rank for rank in stuck.ranks if rank in self._heard], kill=True)

    def _examine(self, folder: str, ranks: Sequence[int], kill: bool) -> None:
        """Look at ranks from outside, where they could not say themselves where they are; kill them or not."""
        asked = []
        for rank in ranks:
            there = NodeAffinitySchedulingStrategy(self._place[rank], soft=False)
            task = postmortem.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            key = f"{folder}/{self._job.stage}-stacks-{rank}.txt"
            asked.append(task.remote(self._job.run, key, self._heard[rank]["pid"], kill))
        if asked:  # a machine may be out of reach: then Ray will say that it is lost
            ray.wait(asked, num_returns=len(asked), timeout=20)

    def _rank_name(self, rank: int) -> str:
        return f"rank {rank} on {self._names.get(self._place[rank], self._place[rank])}"

    def _request(self) -> Request:
        if self.hang:
            return Request.STACKS
        if not self.reason:
            return Request.NOTHING
        return Request.LEAVE_AT_CHECKPOINT if self.reason == "resized" else Request.LEAVE

    def _look_at_machines(self) -> None:
        leaving = draining_nodes()
        if gone := [node for node in dict.fromkeys(self._place) if node in leaving]:
            self.reason, self.why = "preempted", f"{', '.join(self._names.get(node, node) for node in gone)} will be taken away"
            self._monitor.say(f"{self.why}: a checkpoint at the next step")
            return
        lacking = self._gang.most - len(self._place)
        if lacking <= 0 or len(self._heard) < len(self._place):  # until all ranks are placed, what is free is theirs
            return
        wanted = replace(self._gang, least=1, most=lacking)
        if self._growth is None:
            self._growth = Demand(wanted, lacking)  # what an autoscaler sees
        more = lacking if self._growth.place() else len(fit(wanted, nodes()))
        if more:
            self.reason, self.why = "resized", f"there is room for {more} more ranks"


class _Fit(Thread):
    """Ray Train's `fit` in a thread of its own: there it leaves SIGINT to us."""

    def __init__(self, trainer: TorchTrainer):
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer
        self.value: dict[str, Any] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._trainer.fit().return_value  # type: ignore[attr-defined]
        except (TrainingFailedError, RayError) as error:
            # Its frames hold the handle of Ray Train's controller, which would live on, and hold the ranks' machines.
            error.__context__ = None
            self.error = error.with_traceback(None)
        except BaseException as error:
            self.error = error


def _trainer(job: Job, place: list[str], board: Any, notes: str) -> TorchTrainer:
    workers = job.experiment.workers
    return TorchTrainer(
        _rank,  # type: ignore[arg-type]
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=len(place),
            use_gpu=workers.gpu,
            resources_per_worker=dict(gang_of(workers).resources),
            label_selector=[{NODE_ID: node} for node in place],
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{job.stage}-{job.life}-{job.attempt}",
            storage_path=notes,
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": worker_environment(workers)},
        ),
    )


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

    def report(snapshot: Snapshot) -> Request:
        try:
            return ray.get(board.post.remote(snapshot), timeout=10)
        except RayError:
            return Request.NOTHING  # the driver is gone, or slow: it asks again

    job = config["job"]
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it prints the traceback of every rank, of which one says what happened
    try:
        return train(job, place, report)
    except BaseException:
        with suppress(StorageError):
            job.run.put(f"logs/{job.life:06d}.{job.attempt}/{job.stage}-rank-{place.rank}.txt", traceback.format_exc().encode())
        raise


def _span(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
