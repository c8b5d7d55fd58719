"""Tells a group of ranks that hangs from one that is slow, by what the ranks themselves say of where they are.

A rank's report comes from a thread of its own each second, so one that is stopped, or whose interpreter is stuck in a lock, falls silent;
one whose training thread is stuck goes on saying in which phase of which step it is. No timeout of a communication backend takes part.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.telemetry.meter import ENDED, Snapshot
from cluster.telemetry.reminder import Reminder

LEAST = 10.0
"""Least limit of a step, in seconds; more where one of the last hundred steps took longer than a fifth of it. The first step of a process,
which may compile, is the measure of the second one alone."""

FACTOR = 5.0
"""A step may take so many times the slowest of the last hundred."""

START = 1800.0
"""Limit of starting, compiling and restoring, in seconds."""

SILENT_AT_START = 120.0
"""A rank that starts may be silent for so long, in seconds: imports and memory allocations hold the interpreter."""

PHASE_LIMITS = {"data_wait": 300.0, "checkpoint": 1800.0, "evaluation": 3600.0, ENDED: 1800.0}
"""Phases in which a rank waits for the store, under the store's own deadlines, or computes more than a step, or for others' ends."""

ORDER = ("startup", "other", "forward", "backward", "data_wait", "agree", "optimizer", "checkpoint", "evaluation", ENDED)
"""Phases in the order of a step."""


class Hang(RuntimeError):
    """Ranks do not get on, and nothing says that they will."""

    failure = "hang"


@dataclass(frozen=True)
class Stuck:
    """What hangs: the ranks to blame, and a sentence."""

    ranks: Sequence[int]
    text: str


@dataclass
class _Heard:
    snapshot: Snapshot
    at: float


class Watchdog:
    """Hears the snapshots of one group of ranks.

    Args:
        ranks: of the group.
        name: of a rank, with its host, for people.
        clock: seconds that only grow.
    """

    def __init__(self, ranks: int, name: Callable[[int], str], clock: Callable[[], float] = time.monotonic):
        self._ranks, self._name, self._clock = ranks, name, clock
        self._heard: dict[int, _Heard] = {}
        self._began = self._looked = self._advanced = clock()
        self._steps = 0
        self._reminder = Reminder()

    def hear(self, snapshot: Snapshot) -> None:
        """A rank has told where it is."""
        before = self._heard.get(snapshot["rank"])
        if before is None or snapshot["elapsed"] > before.snapshot["elapsed"]:
            self._heard[snapshot["rank"]] = _Heard(snapshot, self._clock())
        if before and before.snapshot["phase"] in PHASE_LIMITS and before.snapshot["phase"] != snapshot["phase"]:
            self._advanced = self._clock()  # what was waited for is there: the rest of the step has its own time
        if (steps := sum(heard.snapshot["steps"] for heard in self._heard.values())) != self._steps:
            self._steps, self._advanced = steps, self._clock()

    def look(self) -> Stuck | None:
        """What hangs now, if anything does; to be called about once a second."""
        now = self._clock()
        if now - self._looked > LEAST / 2:  # the driver itself was away: nothing is known of the ranks meanwhile
            self._began += now - self._looked
            self._advanced = now
            for heard in self._heard.values():
                heard.at = now
        self._looked = now
        return self._silent(now) or self._standing(now)

    def slow(self) -> str:
        """What is waited for, if it is time to say so, else nothing."""
        now = self._clock()
        waited = now - self._advanced
        if not self._reminder.due(waited):
            return ""
        if len(self._heard) < self._ranks or not self._trained():
            return f"the ranks are starting, {waited:.0f} s so far"
        first = self._behind()[0]
        return f"no step for {waited:.0f} s: {self._where(first, now)}"

    def _trained(self) -> bool:
        return bool(self._heard) and all(heard.snapshot["steps"] for heard in self._heard.values())

    def _limit(self) -> float:
        slowest = max((heard.snapshot["slowest_step"] for heard in self._heard.values()), default=0.0)
        return max(LEAST, FACTOR * slowest)

    def _silent(self, now: float) -> Stuck | None:
        limit = self._limit() if self._trained() else SILENT_AT_START
        heards = sorted(self._heard.items())
        silent = [rank for rank, heard in heards if heard.snapshot["phase"] != ENDED and now - heard.at > limit]
        if not silent:
            return None
        said = "; ".join(self._where(rank, now) for rank in silent)
        return Stuck(silent, f"no sign of life for more than {limit:.0f} s: {said}")

    def _standing(self, now: float) -> Stuck | None:
        stood = now - self._advanced
        waits = [PHASE_LIMITS.get(heard.snapshot["phase"], 0.0) for heard in self._heard.values()]
        if len(self._heard) < self._ranks or not self._trained():
            started = sorted(set(range(self._ranks)) - set(self._heard)) or self._behind()
            limit = max([START, *waits])  # a life may begin with a look at val that the one before did not come to
            return Stuck(started, f"the ranks did not start within {limit:.0f} s: {self._name(started[0])}") if stood > limit else None
        limit = max([self._limit(), *waits])
        if stood <= limit:
            return None
        behind = self._behind()
        ahead = sorted(set(self._heard) - set(behind))
        outside = [rank for rank in behind if not self._heard[rank].snapshot["collective"]]
        if not ahead and 0 < len(outside) < len(behind):  # in one phase, but the rest waits for them there
            behind, ahead = outside, sorted(set(behind) - set(outside))
        if not ahead:
            others = f"all {self._ranks} ranks are there: " if self._ranks > 1 else ""
            return Stuck(behind, f"no step for {stood:.0f} s, limit {limit:.0f} s; {others}{self._where(behind[0], now)}")
        # Who waits for its peers at a place that they have left did what it should: they did not come.
        blamed = ahead if self._heard[behind[0]].snapshot["phase"] == "agree" else behind
        said = "; ".join(self._where(rank, now) for rank in blamed)
        return Stuck(blamed, f"no step for {stood:.0f} s, limit {limit:.0f} s; the others wait for it: {said}")

    def _behind(self) -> list[int]:
        """The ranks that are least far."""
        positions = {rank: (heard.snapshot["steps"], ORDER.index(heard.snapshot["phase"])) for rank, heard in self._heard.items()}
        least = min(positions.values())
        return sorted(rank for rank, position in positions.items() if position == least)

    def _where(self, rank: int, now: float) -> str:
        heard = self._heard[rank]
        seconds = heard.snapshot["phase_seconds"] + now - heard.at
        return f"{self._name(rank)} in phase {heard.snapshot['phase']} of its step {heard.snapshot['steps']} for {seconds:.0f} s"
