"""The books of one life of a run: which state every second was in of every worker that the run held.

`telemetry/accounts.py` has the accounts of ranks and tasks that are booked here.

A worker is a rank of a group, or a task. Its place is held from when it was asked for until it was given back, and each of its
milliseconds, counted by the driver's clock, falls in exactly one state. What was not followed by a finished step when a fault came was
lost to that fault, so the seconds of a rank are booked with its next step; what a record says of seconds that are not booked yet is
preliminary.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cluster.telemetry.meter import STATES

BOOK_STATES = (*STATES, "encode", "recovery", "replay", "waiting", "idle")
"""The states of a rank's meter; tasks that make latents; starting again after a fault; work done a second time; no room for the ranks,
which costs nothing; and places that are held for nobody: after the ranks' last word, until Ray has them back."""

VERSION = 1
"""Of a record."""

AGAIN = ("recovery", "replay")
"""States whose every second belongs to a fault."""

NO_FAULT = ""

SPANS = 240
"""Most spans of the timeline; when there are more, two become one."""

SPAN = 5_000
"""Milliseconds of a span at the beginning."""

LONGEST = 2_000
"""Characters of a fault's text that are kept."""

SLOWEST = 10
"""Worker groups whose slowest rank is kept: those where it cost the others most."""


class Berth(NamedTuple):
    """Where a worker is, and what that costs.

    Attributes:
        node: its machine, for people.
        price: of the whole machine, in dollars an hour; negative where nobody knows it.
        share: of the machine that the worker holds, in [0, 1].
    """

    node: str
    price: float = -1.0
    share: float = 0.0

    def dollars(self, ms: int) -> float:
        """What milliseconds of it cost; 0 where nobody knows."""
        return max(0.0, self.price) * self.share * ms / 3_600_000


NOWHERE = Berth("", 0.0)
"""The berth of a worker that there is no room for: it costs nothing."""


class Line(NamedTuple):
    """What a sum of the books is of."""

    stage: str
    state: str
    fault: str
    berth: Berth


def even(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """A whole number divided in proportion to weights of at least 0, not all of them 0: the parts sum to it exactly."""
    whole, parts, seen, given = sum(weights.values()), {}, 0.0, 0
    for number, (name, weight) in enumerate(weights.items(), start=1):
        seen += weight
        upto = total if number == len(weights) else min(total, round(total * seen / whole))
        parts[name], given = upto - given, upto
    return {name: part for name, part in parts.items() if part}


class Books:
    """What a life books; one thread writes, others may read.

    Args:
        life: its number.
        clock: seconds of Unix time that only grow.

    Attributes:
        life: its number.
        furthest: the furthest progress of each stage, of earlier lives too, in items.
        reached: where each stage stands, in items: below `furthest` where it does work again.
        owed: of each stage, up to which progress it does work again on account of which fault, ascending.
        fatal: the fault that ended the life, if one did.
    """

    def __init__(self, life: int, clock: Callable[[], float] | None = None):
        self.life, self.fatal = life, NO_FAULT
        self.furthest, self.reached = dict[str, float](), dict[str, float]()
        self.owed = dict[str, list[tuple[float, str]]]()
        self._clock = clock or _steady()
        self._sums: dict[Line, int] = {}
        self._faults: list[dict[str, Any]] = []
        self._slowest: list[dict[str, Any]] = []
        self._groups: list[Callable[[], dict[str, Any] | None]] = []
        self._span, self._spans = SPAN, list[dict[str, float]]()
        self._open: list[HeldPlace] = []
        self._began = self.now()

    def now(self) -> int:
        """Milliseconds of Unix time."""
        return round(1000 * self._clock())

    def fault(self, kind: str, stage: str, text: str, life: int | None = None, restarts: bool = False) -> str:
        """Note a fault, or another reason to start again; returns the name under which seconds are booked on it.

        Args:
            kind: its class of failure, or `resized`, `driver`.
            stage: that it hit.
            text: what happened, in a sentence.
            life: that it hit, if not this one.
            restarts: whether ranks are started again for it: not those of a task, nor for what ends the life.
        """
        name = f"{self.life}.{len(self._faults) + 1}"
        progress = self.furthest.get(stage, 0.0)
        self._faults.append(
            {
                **{"fault": name, "class": kind, "stage": stage, "text": text[:LONGEST]},
                **{"time": self.now(), "life": life or self.life, "progress": progress, "restarts": restarts},
            }
        )
        return name

    def ends(self, kind: str, stage: str, text: str) -> None:
        """A fault ends the life: the last one, if that is how it was noted, or another."""
        last = self._faults[-1] if self._faults else {}
        noted = (last.get("class"), last.get("stage"), last.get("text")) == (kind, stage, text[:LONGEST])
        self.fatal = last["fault"] if noted else self.fault(kind, stage, text)

    def reach(self, stage: str, progress: float) -> None:
        """A stage has come so far."""
        self.reached[stage] = progress
        self.furthest[stage] = max(self.furthest.get(stage, 0.0), progress)

    def owe(self, stage: str, fault: str) -> None:
        """What a stage has done since its checkpoint it does again, on account of this fault."""
        here = self.reached.get(stage, 0.0)
        self.owed[stage] = [(here, fault), *(one for one in self.owed.get(stage, []) if one[0] > here)]

    def owing(self, stage: str, progress: float) -> tuple[float, str]:
        """Up to which progress a stage that stands here does work again, and on account of which fault; of none: (0, "")."""
        return next((one for one in self.owed.get(stage, ()) if one[0] > progress), (0.0, NO_FAULT))

    def book(self, stage: str, parts: Mapping[str, int], end: int, berth: Berth, fault: str = NO_FAULT) -> None:
        """Book milliseconds of one worker, by state, that passed until `end`; in the timeline one after the other."""
        begin = end - sum(parts.values())
        for state, ms in parts.items():
            assert state in BOOK_STATES and (fault or state not in AGAIN), f"{state} of {fault or 'no fault'}"
            line = self.line(stage, state, berth, fault)
            self._sums[line] = self._sums.get(line, 0) + ms
            self._draw(begin, begin + ms, state)
            begin += ms

    def line(self, stage: str, state: str, berth: Berth, fault: str) -> Line:
        """What is booked for a worker in a state; only what a fault is to blame for names it."""
        return Line(stage, state, fault if state in (*AGAIN, "waiting") else NO_FAULT, berth)

    def states(self) -> dict[tuple[str, str], float]:
        """Seconds that are booked, by stage and state; no sum ever falls."""
        sums: dict[tuple[str, str], int] = {}
        for line, ms in list(self._sums.items()):
            sums[line.stage, line.state] = sums.get((line.stage, line.state), 0) + ms
        return {key: ms / 1000 for key, ms in sums.items()}

    def cost(self) -> float:
        """Dollars of what is booked, on machines whose price is known."""
        return sum(line.berth.dollars(ms) for line, ms in list(self._sums.items()))

    def record(self, **facts: Any) -> dict[str, Any]:
        """All of it in plain JSON types: booked, and what is not booked yet as it seems now.

        Args:
            facts: more to keep with it.
        """
        now, sums = self.now(), dict(self._sums)
        held = [held.seems(now) for held in list(self._open)]  # once: others go on booking
        pending: dict[Line, int] = {}
        for line, ms in (one for seems in held for one in seems):
            pending[line] = pending.get(line, 0) + ms
        berths = list(dict.fromkeys(line.berth for line in (*sums, *pending)))

        def rows(found: Mapping[Line, int]) -> list[list[Any]]:
            return [[line.stage, line.state, line.fault, berths.index(line.berth), ms] for line, ms in found.items() if ms]

        return {
            "version": VERSION,
            "life": self.life,
            "began": self._began,
            "until": now,
            "berths": [berth._asdict() for berth in berths],
            "lines": rows(sums),
            "pending": rows(pending),
            "held": [[line.stage, berths.index(line.berth)] for seems in held for line, _ in seems[:1]],
            "faults": list(self._faults),
            "fatal": self.fatal,
            "furthest": dict(self.furthest),
            "reached": dict(self.reached),
            "owed": {stage: list(owed) for stage, owed in self.owed.items()},
            "slowest": self._costliest(found for slowest in list(self._groups) if (found := slowest())),
            "timeline": {"span": self._span, "spans": [dict(span) for span in self._spans]},
            **facts,
        }

    def hold(self, held: "HeldPlace") -> None:
        """A worker's place is held from now on."""
        self._open.append(held)

    def give_back(self, held: "HeldPlace") -> None:
        """It is not any more."""
        self._open.remove(held)

    def watch(self, slowest: Callable[[], dict[str, Any] | None]) -> None:
        """A group trains from now on, and tells this of the rank that its others wait for."""
        self._groups.append(slowest)

    def watched(self, slowest: Callable[[], dict[str, Any] | None]) -> None:
        """It has ended, or is started again: what it tells now is kept."""
        self._groups.remove(slowest)
        self._slowest = self._costliest([found] if (found := slowest()) else [])

    def _costliest(self, more: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted([*self._slowest, *more], key=lambda one: -one["seconds"])[:SLOWEST]

    def _draw(self, begin: int, end: int, state: str) -> None:
        while end - self._began > SPANS * self._span:
            self._spans = [_plus(self._spans[at : at + 2]) for at in range(0, len(self._spans), 2)]
            self._span *= 2
        first, last = max(0, begin - self._began), end - self._began  # what an earlier life held is not drawn here
        for number in range(first // self._span, (last - 1) // self._span + 1 if last > first else 0):
            while len(self._spans) <= number:
                self._spans.append({})
            inside = min(last, (number + 1) * self._span) - max(first, number * self._span)
            self._spans[number][state] = round(self._spans[number].get(state, 0.0) + inside / 1000, 3)


class HeldPlace:
    """One worker's place: up to when its milliseconds are known, and those that wait to be booked.

    Args:
        books: of the life.
        stage: that it is held for.
        berth: where it is.
        doing: the state it is in until something else is known.
        fault: to blame for what is lost here, or done again.

    Attributes:
        at: milliseconds of Unix time up to which its time is known.
        waiting: milliseconds by state that are known and not booked.
    """

    def __init__(self, books: Books, stage: str, berth: Berth, doing: str, fault: str = NO_FAULT):
        self.stage, self.berth, self.doing, self.fault = stage, berth, doing, fault
        self.waiting: dict[str, int] = {}
        self.at = books.now()
        self._books = books
        books.hold(self)

    def spend(self, now: int, weights: Mapping[str, float]) -> None:
        """The time until now went so."""
        if now > self.at:
            found = even(now - self.at, weights) if sum(weights.values()) > 0 else {self.doing: now - self.at}
            for state, ms in found.items():
                self.waiting[state] = self.waiting.get(state, 0) + ms
            self.at = now

    def wait(self, seconds: float) -> None:
        """For so long, from where its time is known, there was no place: that costs nothing."""
        ms = min(round(1000 * seconds), self._books.now() - self.at)
        if ms > 0:
            self.at += ms
            self._books.book(self.stage, {"waiting": ms}, self.at, NOWHERE, self.fault)

    def settle(self, fault: str = NO_FAULT, again: float = 0.0, owed: str = NO_FAULT) -> None:
        """Book what waits: lost to a fault, or as it was, where this share of it was done a second time on account of another fault."""
        if fault:
            twice, parts = 0, {"recovery": sum(self.waiting.values())}
        else:
            replay = {state: round(again * ms) for state, ms in self.waiting.items() if state not in ("recovery", "starting")}
            twice, parts = sum(replay.values()), {state: ms - replay.get(state, 0) for state, ms in self.waiting.items()}
        kept = {state: ms for state, ms in parts.items() if ms}
        if twice:
            self._books.book(self.stage, {"replay": twice}, self.at - sum(kept.values()), self.berth, owed)
        self._books.book(self.stage, kept, self.at, self.berth, fault or self.fault)
        self.waiting = {}

    def end(self, fault: str = NO_FAULT, at: int = 0) -> None:
        """The place is given back, now or at this moment."""
        now = self._books.now()
        self.spend(min(at or now, now), {})
        self.settle(fault)
        self._books.give_back(self)

    def seems(self, now: int) -> list[tuple[Line, int]]:
        """What waits, and the time since, as it would be booked if all went well."""
        seems = {**self.waiting}
        seems[self.doing] = seems.get(self.doing, 0) + max(0, now - self.at)
        return [(self._books.line(self.stage, state, self.berth, self.fault), ms) for state, ms in seems.items()]


def _plus(spans: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for span in spans:
        for state, seconds in span.items():
            sums[state] = sums.get(state, 0.0) + seconds
    return sums


def _steady() -> Callable[[], float]:
    """Unix time at the start, and from then on as a clock that nobody sets goes."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()
