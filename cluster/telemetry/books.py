"""The books of one life of a run: which state every second was in of every worker that the run held.

A worker is a rank of a group, or a task. Its place is held from when it was asked for until it was given back, and each of its
milliseconds, counted by the driver's clock, falls in exactly one state. What was not followed by a finished step when a fault came was
lost to that fault, so the seconds of a rank are booked with its next step; what a record says of seconds that are not booked yet is
preliminary.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.telemetry.meter import STATES, Snapshot, state_of

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
        furthest: the furthest progress of each stage, of earlier lives too, in items: what is done again below it is replay.
    """

    def __init__(self, life: int, clock: Callable[[], float] | None = None):
        self.life, self.furthest = life, dict[str, float]()
        self._clock = clock or _steady()
        self._sums: dict[Line, int] = {}
        self._faults: list[dict[str, Any]] = []
        self._slowest: list[dict[str, Any]] = []
        self._span, self._spans = SPAN, list[dict[str, float]]()
        self._open: list[_Held] = []
        self._began = self.now()

    def now(self) -> int:
        """Milliseconds of Unix time."""
        return round(1000 * self._clock())

    def fault(self, kind: str, stage: str, text: str, life: int | None = None) -> str:
        """Note a fault, or another reason to start again; returns the name under which seconds are booked on it.

        Args:
            kind: its class of failure, or `resized`, `driver`.
            stage: that it hit.
            text: what happened, in a sentence.
            life: that it hit, if not this one.
        """
        name = f"{self.life}.{len(self._faults) + 1}"
        progress = self.furthest.get(stage, 0.0)
        self._faults.append(
            {
                **{"fault": name, "class": kind, "stage": stage, "text": text},
                **{"time": self.now(), "life": life or self.life, "progress": progress},
            }
        )
        return name

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
        for held in list(self._open):
            for line, ms in held.seems(now):
                sums[line] = sums.get(line, 0) + ms
        berths = list(dict.fromkeys(line.berth for line in sums))
        lines = [[line.stage, line.state, line.fault, berths.index(line.berth), ms] for line, ms in sums.items() if ms]
        return {
            "version": VERSION,
            "life": self.life,
            "began": self._began,
            "until": now,
            "berths": [berth._asdict() for berth in berths],
            "lines": lines,
            "held": [[line.stage, berths.index(line.berth)] for held in self._open for line, _ in held.seems(now)[:1]],
            "faults": list(self._faults),
            "furthest": dict(self.furthest),
            "slowest": list(self._slowest),
            "timeline": {"span": self._span, "spans": [dict(span) for span in self._spans]},
            **facts,
        }

    def hold(self, held: "_Held") -> None:
        """A worker's place is held from now on."""
        self._open.append(held)

    def give_back(self, held: "_Held") -> None:
        """It is not any more."""
        self._open.remove(held)

    def slowest(self, stage: str, rank: int, node: str, cost: float, ranks: int) -> None:
        """Note the rank that a group waited for, and how many seconds that cost the others."""
        found = {"stage": stage, "rank": rank, "node": node, "seconds": round(cost, 3), "ranks": ranks}
        self._slowest = sorted([*self._slowest, found], key=lambda one: -one["seconds"])[:SLOWEST]

    def _draw(self, begin: int, end: int, state: str) -> None:
        while end - self._began > SPANS * self._span:
            self._spans = [_plus(self._spans[at : at + 2]) for at in range(0, len(self._spans), 2)]
            self._span *= 2
        first, last = begin - self._began, end - self._began
        for number in range(max(0, first) // self._span, max(0, last - 1) // self._span + 1):
            while len(self._spans) <= number:
                self._spans.append({})
            inside = min(last, (number + 1) * self._span) - (max(first, number * self._span) if number else first)
            self._spans[number][state] = round(self._spans[number].get(state, 0.0) + inside / 1000, 3)


class _Held:
    """One worker's place: up to when its milliseconds are known, and those that wait to be booked."""

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

    def settle(self, fault: str = NO_FAULT, again: float = 0.0) -> None:
        """Book what waits: lost to a fault, or as it was, where this share of it was done a second time."""
        if fault:
            parts = {"recovery": sum(self.waiting.values())}
        else:
            parts = {}
            for state, ms in self.waiting.items():
                twice = round(again * ms) if state not in ("recovery", "starting") else 0
                parts["replay"] = parts.get("replay", 0) + twice
                parts[state] = parts.get(state, 0) + ms - twice
        self._books.book(self.stage, {state: ms for state, ms in parts.items() if ms}, self.at, self.berth, fault or self.fault)
        self.waiting = {}

    def end(self, fault: str = NO_FAULT, at: int = 0) -> None:
        """The place is given back, now or at this moment."""
        self.spend(at or self._books.now(), {})
        self.settle(fault)
        self._books.give_back(self)

    def seems(self, now: int) -> list[tuple[Line, int]]:
        """What waits, and the time since, as it would be booked if all went well."""
        seems = {**self.waiting}
        seems[self.doing] = seems.get(self.doing, 0) + max(0, now - self.at)
        return [(self._books.line(self.stage, state, self.berth, self.fault), ms) for state, ms in seems.items()]


class GroupBooks:
    """The places of a worker group's ranks, from when Ray is asked for them until it has them back.

    Args:
        books: of the life.
        stage: that they train.
        berths: of each rank.
        progress: of the checkpoint that they go on from, in items.
        fault: why they had to be started, if it was for a fault.
        since: Unix time in seconds from which they are held; 0: now.
    """

    def __init__(self, books: Books, stage: str, berths: Sequence[Berth], progress: float, fault: str = NO_FAULT, since: float = 0.0):
        self._books, self._stage = books, stage
        self._held = [_Held(books, stage, berth, "recovery" if fault else "starting", fault) for berth in berths]
        for held in self._held:
            held.at = min(held.at, round(1000 * since) or held.at)
        self._begin(progress)

    def _begin(self, progress: float) -> None:
        self._heard: dict[int, Snapshot] = {}
        self._done = dict.fromkeys(range(len(self._held)), progress)
        self._known = self._books.furthest.get(self._stage, 0.0)

    def hear(self, snapshot: Snapshot) -> None:
        """A rank has told where its time went."""
        if snapshot["rank"] >= len(self._held):
            return
        now, rank, held = self._books.now(), snapshot["rank"], self._held[snapshot["rank"]]
        before = self._heard.get(rank)
        if before and (before["process"] != snapshot["process"] or before["elapsed"] > snapshot["elapsed"]):
            return
        states = snapshot["totals"]["states"]
        spent = {state: seconds - (before["totals"]["states"][state] if before else 0.0) for state, seconds in states.items()}
        if before is None:  # until there was a process
            spent["starting"] += max(0.0, (now - held.at) / 1000 - sum(spent.values()))
        if held.fault:
            spent["recovery"] = spent.pop("starting")
        held.spend(now, {state: max(0.0, seconds) for state, seconds in spent.items()})
        held.doing = "recovery" if held.fault and snapshot["phase"] == "startup" else state_of(snapshot["phase"])
        self._heard[rank] = snapshot
        if snapshot["steps"] > (before["steps"] if before else 0):
            self._settle(rank, held, snapshot["gauges"].get("progress_items", 0.0))

    def _settle(self, rank: int, held: _Held, progress: float) -> None:
        done, known = self._done[rank], self._known
        again = min(1.0, max(0.0, known - done) / (progress - done)) if progress > done else float(progress <= known)
        held.settle(again=again if held.fault else 0.0)
        self._done[rank] = progress
        self._books.furthest[self._stage] = max(self._books.furthest.get(self._stage, 0.0), progress)

    def lose(self, fault: str, progress: float) -> None:
        """The ranks failed; they are started again on the same places, from a checkpoint at this progress."""
        self._note_slowest()
        for held in self._held:
            held.doing = "recovery"
            held.spend(self._books.now(), {})
            held.settle(fault)
            held.fault = fault
        self._begin(progress)

    def close(self, fault: str = NO_FAULT, failed: bool = False, until: float = 0.0) -> None:
        """Ray has the places back.

        Args:
            fault: what the ranks ended for, if not since they are done.
            failed: whether they failed, and did not leave at a checkpoint.
            until: Unix time in seconds of when it had them; 0: now.
        """
        self._note_slowest()
        for held in self._held:
            if not failed:
                held.settle()
            held.doing = "recovery" if fault else "idle"
            held.end(fault, round(1000 * until))
        self._held = []

    def _note_slowest(self) -> None:
        waits = {rank: snapshot["totals"]["phases"]["agree"]["seconds"] for rank, snapshot in self._heard.items()}
        if len(waits) > 1:
            slowest = min(waits, key=lambda rank: waits[rank])
            cost = sum(seconds - waits[slowest] for seconds in waits.values())
            self._books.slowest(self._stage, slowest, self._held[slowest].berth.node, cost, len(waits))


class PlaceBooks:
    """Places in which nobody works: ranks that there is no room for, or what is reserved before there are ranks for it.

    Args:
        books: of the life.
        stage: that they are for.
        berths: of each; `NOWHERE` for those that wait.
        state: `waiting` or `idle`.
        fault: why ranks had to be started, if it was for a fault.
    """

    def __init__(self, books: Books, stage: str, berths: Sequence[Berth], state: str, fault: str = NO_FAULT):
        self._held = [_Held(books, stage, berth, state, fault) for berth in berths]

    def close(self) -> None:
        """There is room, or it is given up; or the places are given back."""
        for held in self._held:
            held.end()


class TaskBooks:
    """The tasks of a step, one line of the books a call.

    Args:
        books: of the life.
        stage: the step.
        state: of a task that works: `encode` or `evaluate`.
        berth: of a task on a machine, by its address; of an empty one before it is known.
    """

    def __init__(self, books: Books, stage: str, state: str, berth: Callable[[str], Berth]):
        self._books, self._stage, self._state, self._berth = books, stage, state, berth
        self._held: dict[int, _Held] = {}

    def begin(self, call: int) -> None:
        """There is room for this call from now on."""
        self._held[call] = _Held(self._books, self._stage, self._berth(""), self._state)

    def end(self, call: int, address: str = "", starting: float = 0.0, working: float = 0.0) -> None:
        """A call is answered, or given up: then its seconds are those since it began.

        Args:
            call: its number.
            address: of the machine that answered.
            starting: seconds that its process took to start.
            working: seconds that it worked.
        """
        held = self._held.pop(call)
        if address:
            held.berth = self._berth(address)
            held.at = self._books.now() - round(1000 * (starting + working))  # it may have waited among others' tasks
        held.spend(self._books.now(), {"starting": starting, self._state: working})
        held.end()

    def lose(self, call: int, kind: str, text: str) -> None:
        """A call failed, and what it did is lost to a fault of this class."""
        held = self._held.pop(call)
        held.spend(self._books.now(), {})
        held.settle(self._books.fault(kind, self._stage, text))
        held.end()


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
