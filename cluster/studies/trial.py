"""The driver of one trial: a run like any other, whose rungs go into the ledger, and which ends where the ledger says so."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from cluster.config.loading import ConfigError
from cluster.driver.interruption import Enough
from cluster.driver.pin import pin
from cluster.driver.run import STEPS, execute
from cluster.evaluation.rows import MODEL
from cluster.evaluation.rung import read_rung
from cluster.runtime.failures import StageFailed
from cluster.runtime.poller import Poller
from cluster.storage import StorageError
from cluster.studies.first_stage import train_first_stage
from cluster.studies.sweep import OpenSweep
from cluster.telemetry.display import Display

LOOK = 1.0
"""Seconds between two looks for rungs that were measured, and for decisions."""

log = logging.getLogger(__name__)


def run_trial(
    opened: OpenSweep, number: int, report: Callable[[Mapping[str, Any]], None], ending: Callable[[], bool | None] = lambda: False
) -> None:
    """Bring a trial to its end, or to where it is stopped.

    Args:
        opened: the sweep.
        number: of the trial.
        report: told that something of the trial was entered in the ledger.
        ending: asked all the time; whether the sweep was told to end.

    Raises:
        ConfigError: if the ledger has another run under this number, and as `cluster.driver.run.execute`.
        StageFailed, Superseded: as that; the same trial goes on later.
        ToldToEnd: if it was, when there is a checkpoint.
    """
    ledger = opened.ledger
    recorded = ledger.suggested(number)
    trial = opened.trial(number, recorded.point)
    if trial.run != recorded.run:
        raise ConfigError(
            f"trial {number} of sweep {opened.sweep.name} is run {recorded.run} in {ledger.url}, but here it would be {trial.run}: another "
            "version of this program suggested it. Go on with that one, or name the sweep anew"
        )
    steering = _Steering(opened, number, trial.run, report, ending)
    stopped = steering.look()
    with Display() as display:
        try:
            if trial.first and not stopped:
                train_first_stage(trial.first, display, steering)
            pinned = pin(trial.experiment, trial.run)
            enough = (lambda: stopped) if stopped else steering
            scores = execute(trial.experiment, pinned, STEPS, display, trial.text, enough=enough)[MODEL].to_dict()
            steering.look()
            ledger.enter_end(number, "DONE", scores=scores["official"] | scores["repaired"] | scores["extra"])
        except Enough as told:
            if steering.ending:
                raise ToldToEnd(f"trial {number}: {told}; the same command goes on from its checkpoint") from told
            ledger.enter_end(number, "STOPPED", str(told))
            display.say(f"trial {number} ends: {told}")
        except StageFailed as failed:
            if not would_fail_again(failed):
                raise
            steering.look()
            ledger.enter_end(number, "FAILED", failed.what)
            display.say(f"trial {number} failed: {failed}")
    report({"trial": number})


def would_fail_again(failed: StageFailed) -> bool:
    """Whether a failure is a trial's end: its weights are not finite. Where items are to blame, the data can be mended, or go without."""
    return failed.failure.name == "non_finite" and not getattr(failed.cause, "items", ())


class ToldToEnd(RuntimeError):
    """The sweep was told to end, and the trial has left at a checkpoint."""

    failure = "preempted"


class _Steering:
    """Tells the ledger what the run has measured, and the run what the ledger says; called by the run all the time.

    Attributes:
        ending: whether the sweep was told to end.
    """

    def __init__(
        self,
        opened: OpenSweep,
        number: int,
        run: str,
        report: Callable[[Mapping[str, Any]], None],
        ending: Callable[[], bool | None],
    ):
        self.ending, self._ask_ending = False, ending
        halving = opened.sweep.halving
        self._rungs, self._clips = (halving.rungs, halving.clips) if halving else ((), 0)
        self._ledger, self._number, self._run, self._report = opened.ledger, number, opened.home.at(f"runs/{run}"), report
        self._entered, self._going_on, self._reported = set[int](), set[int](), 0
        self._asked, self._turn = set[int](), 0
        self._poller = Poller(self._ask, LOOK)

    def __call__(self) -> str:
        self.ending = self.ending or bool(self._ask_ending())
        if self.ending:
            return "the sweep was told to end"
        if not self._rungs or (why := self._poller.answer()) is None:
            return ""
        if len(self._entered) > self._reported:
            self._reported = len(self._entered)
            self._report({"trial": self._number, "rungs": self._reported})
            return self._poller.answer() or why  # what was decided on that may be known already
        return why

    def look(self) -> str:
        """Enter what was measured since; why the trial is stopped, if it is."""
        for rung in self._missing():
            self._enter(rung)
        return self._stopped()

    def _missing(self) -> list[int]:
        return [rung for rung in range(len(self._rungs)) if rung not in self._entered]

    def _enter(self, rung: int) -> None:
        """Enter what was measured at a rung, if it was; what an earlier release kept is there from the beginning or never."""
        measured = read_rung(self._run, self._rungs[rung], self._clips, kept_before=rung not in self._asked)
        self._asked.add(rung)
        if measured is not None:
            self._ledger.enter_rung(self._number, rung, measured)
            self._entered.add(rung)

    def _stopped(self) -> str:
        """Why the trial is stopped, if it is; what was decided at a rung never changes, and comes after what was at those below."""
        for rung in sorted(self._entered - self._going_on):
            if (choice := self._ledger.decided(self._number, rung)) is None:
                break
            if not choice.goes_on:
                return choice.why
            self._going_on.add(rung)
        return ""

    def _ask(self) -> str:
        """As `look`, which many trials ask for all the time: of one rung, each in its turn, for one that was passed before stays away."""
        try:
            if missing := self._missing():
                self._enter(missing[self._turn % len(missing)])
                self._turn += 1
            return self._stopped()
        except StorageError as error:
            log.warning("no look into the ledger: %s", error)
            return ""
