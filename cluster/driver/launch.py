"""One stage on Ray Train: a worker group that waits for its place, is watched, and is started again where the failure table says so."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.train import TrainingFailedError

from cluster.driver.group import POLL, Elsewhere, Group
from cluster.driver.interruption import Enough, Interruption, never
from cluster.driver.ray_train import set_defaults
from cluster.driver.suspects import Suspects
from cluster.runs.checkpoint import newest_progress
from cluster.runs.logs import write_end
from cluster.runtime.failures import LOST, PREEMPTED, SAME, USER, Budget, StageFailed, classify, inner
from cluster.runtime.nodes import nodes
from cluster.runtime.placement import Gang, NoPlace, has_room_without, wait_for_place
from cluster.runtime.scratch import scratch_folder
from cluster.storage import StorageError
from cluster.telemetry.monitor import StageMonitor
from cluster.training.job import Job

PAUSES = (0.0, 2.0, 5.0, 10.0)
"""Seconds before the first, second, ... restart for a failure without progress, the last of them before all that follow: most of what
passes by itself needs a moment. The first is at once, for a machine that is gone is no reason to wait."""

SPARE = 5.0
"""Seconds in which ranks that have failed give back their machines; then there is room without one of them, or there is none."""


def launch(
    job: Job,
    gang: Gang,
    monitor: StageMonitor,
    assert_ours: Callable[[], None],
    enough: Callable[[], str] = never,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Train one stage on groups of Ray workers, one after the other, until it is at its end.

    Args:
        job: what every rank does.
        gang: how many ranks, and what each needs.
        monitor: takes the ranks' numbers and what happens to the group.
        assert_ours: raises once another driver has the run.
        enough: asked all the time; says why the ranks are to leave for good, once they are.
        clock: seconds that only grow.
        pause: waits so many seconds.

    Returns:
        What rank 0's `train` returned.

    Raises:
        StageFailed: if a failure is of a class that is not retried, or its budget is spent.
        ValueError: if there can never be room for the ranks.
        Superseded: if another driver has the run.
        Enough: when the ranks have left for good.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the ranks have written a checkpoint.
    """
    set_defaults()
    with Interruption() as interruption, scratch_folder() as notes:
        try:
            return _Stage(job, gang, monitor, interruption, assert_ours, enough, clock, pause).train(str(notes))
        except StageFailed as failed:
            monitor.blame(failed.failure.name, failed.what)
            monitor.give_back(failed=True)
            raise
        finally:
            monitor.release()
            monitor.give_back()


class _Stage:
    def __init__(
        self,
        job: Job,
        gang: Gang,
        monitor: StageMonitor,
        interruption: Interruption,
        assert_ours: Callable[[], None],
        enough: Callable[[], str],
        clock: Callable[[], float],
        pause: Callable[[float], None],
    ):
        self._suspects, self._pause, self._failures = Suspects(clock), pause, 0
        self._job, self._gang, self._enough = job, replace(gang, owner=job.run.url, avoid=self._suspects.left_out), enough
        self._monitor, self._interruption, self._assert_ours = monitor, interruption, assert_ours
        self._budget = Budget(job.experiment.run.retries)
        self._furthest = newest_progress(job.run, job.stage)

    def train(self, notes: str) -> dict[str, Any]:
        """Start ranks until they are at the end."""
        monitor, interruption = self._monitor, self._interruption
        while True:
            group = None
            try:
                group = Group(self._job, self._gang, self._place(), monitor, interruption, self._assert_ours, self._enough)
                result = group.train(notes, self._judge)
            except Elsewhere:
                monitor.give_back(failed=True)
                self._assert_wanted()
                continue
            except (TrainingFailedError, RayError, StorageError) as error:
                self._judge(error, group)
                monitor.give_back(failed=True)
                continue
            if not result["left"] and not interruption.signal:
                return result
            if interruption.signal:  # also where the stage came to its end meanwhile: told to end is told to end
                monitor.say(f"checkpoint at {result['progress']} items; the same command goes on from there")
                interruption.end()
            write_end(self._job.run, self._job.life, group.attempt, self._job.stage, group.why)
            if group.reason == "enough":
                raise Enough(group.why)
            monitor.restarted(group.reason, f"{group.why}: checkpoint at {result['progress']} items, starting the ranks again")
            monitor.give_back(left=True)

    def _place(self) -> list[str]:
        """The machine of each rank, when there is room."""

        def report(waited: float, text: str) -> None:
            self._assert_wanted()
            self._monitor.waiting(waited, text)

        self._monitor.placing(self._gang.least)
        place = self._place_without(report)
        if place is None:
            place = wait_for_place(replace(self._gang, avoid=frozenset), 60 * self._job.experiment.run.wait_minutes, report)
        self._monitor.placed()
        return place

    def _place_without(self, report: Callable[[float, str], None]) -> list[str] | None:
        """The same on machines that no failures name; None where there is none to leave out, or no room without it."""
        avoided = self._suspects.left_out()
        out = [node.id for node in nodes() if node.id in avoided] if avoided else []
        if not out or not has_room_without(self._gang):
            return None
        try:
            place = wait_for_place(self._gang, SPARE, report)
        except NoPlace:
            return None
        for machine in out:
            self._monitor.say(self._suspects.why(machine))
        return place

    def _assert_wanted(self) -> None:
        """While nothing runs, nothing is lost by an end at once.

        Raises:
            Superseded, Enough, KeyboardInterrupt, SystemExit: if there is a reason for one.
        """
        self._assert_ours()
        if self._interruption.signal:
            self._interruption.end()
        if why := self._enough():
            raise Enough(why)

    def _judge(self, error: Exception, group: Group | None) -> None:
        """Say what failed and that the ranks start again.

        Raises:
            StageFailed: if they do not, for the class of failure or its budget.
            KeyboardInterrupt, SystemExit: if the run was told to end.
            Enough: if it was told that it has come far enough.
        """
        hang = group.hang if group else None
        failure, cause = classify([hang] if hang else getattr(error, "worker_failures", {0: error}).values())
        if group and group.reason == "preempted" and failure is LOST:  # the machine did not stay as long as the notice said
            failure = PREEMPTED
        where = group.where(error, cause) if group else ""
        with suppress(StorageError):  # what the store cannot tell now is no progress
            if (progress := newest_progress(self._job.run, self._job.stage)) > self._furthest:
                self._furthest = progress
                self._budget.refill()
                self._suspects.forget()
                self._failures = 0
        tried = ""
        of_a_rank = any(inner(one) is cause for one in getattr(error, "worker_failures", {}).values())
        if failure is LOST and of_a_rank and self._budget.repeated(cause):
            failure, tried = USER, f"the same error {SAME} times without progress"
        if group:
            write_end(self._job.run, self._job.life, group.attempt, self._job.stage, f"{failure.name}, {where}\n{error}")
        if self._interruption.signal:
            self._interruption.end()
        if group and group.reason == "enough":
            raise Enough(group.why) from cause
        allowed = self._budget.allows(failure)
        failed = StageFailed(self._job.stage, failure, cause, where, tried or str(self._budget))
        if not allowed:
            raise failed from cause
        if group and failure.of_a_machine:
            self._suspects.blame(*group.to_blame(error, cause))
        seconds = 0.0 if failure.free else PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += not failure.free
        soon = f" in {seconds:g} s" if seconds else ""
        self._monitor.restarted(failure.name, f"{failed.what}; starting the ranks again{soon} ({self._budget})")
        for _ in range(round(seconds / POLL)):
            self._assert_wanted()
            self._pause(POLL)
