"""The meter of one rank and the tally of all: what was done and where the seconds went, as numbers that only grow.

Nothing but the standard library is imported, so that a rank builds its meter before torch: the account opens there, and from
then on every second lies in exactly one state.
"""

import os
import platform
import threading
import time
import uuid
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

from cluster.telemetry.metrics import METRICS

PHASES = {
    "data_wait": "data_wait",
    "forward": "compute",
    "backward": "compute",
    "agree": "compute",
    "optimizer": "compute",
    "checkpoint": "checkpoint",
    "evaluation": "evaluate",
}
"""The phases of a step, each with the state its seconds fall in."""

ENDED = "ended"
"""What a rank is at that is through with its stage, or has failed, and has only to leave."""

STATES = ("starting", "compute", "data_wait", "checkpoint", "evaluate")
"""States of a rank. What lies outside the phases is `starting` until `Meter.begin` and `compute` from then on."""


def state_of(phase: str) -> str:
    """The state in which a rank is at this: a phase, `startup`, `other`, or `ended`."""
    return PHASES.get(phase) or ("starting" if phase == "startup" else "compute")


RANK_GAUGES = frozenset(metric.name for metric in METRICS if metric.source in ("rank 0", "every rank"))
"""What a rank may set in `Meter.gauges`."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds in seconds of the step histogram's buckets; one more bucket takes what lasts longer."""


class PhaseTotals(TypedDict):
    """Seconds of one phase in finished steps, and how many of those steps fell in each bucket."""

    seconds: float
    counts: list[int]


class Totals(TypedDict):
    """The numbers of a rank that only grow; sums over ranks and processes have the same form."""

    items: int
    bytes: int
    flops: float
    store_faults: int
    states: dict[str, float]
    phases: dict[str, PhaseTotals]


class Snapshot(TypedDict):
    """A meter's state in plain JSON types; `process` tells one meter from the one that replaces it after a restart.

    `phase` is what the rank is at, since `phase_seconds`, and `collective` whether it waits for other ranks there; `steps` are those of
    this process, `slowest_step` the longest of the last hundred in seconds, without waits for the store and looks at val, and without the
    first one once there is another: it may have compiled. `pid` is the process.
    """

    rank: int
    ranks: int
    stage: str
    process: str
    host: str
    pid: int
    elapsed: float
    phase: str
    phase_seconds: float
    collective: bool
    steps: int
    slowest_step: float
    totals: Totals
    gauges: dict[str, float]


class Meter:
    """Counts for one rank in one stage; a snapshot may be taken from another thread at any moment.

    Attributes:
        gauges: the latest value of any of `RANK_GAUGES`, by name.
        store_faults: tells how many requests to storage failed in this process so far.
    """

    def __init__(self, rank: int, ranks: int, stage: str, clock: Callable[[], float] = time.monotonic):
        self.gauges: dict[str, float] = {}
        self.store_faults: Callable[[], int] = lambda: 0
        self._rank, self._ranks, self._stage = rank, ranks, stage
        self._process = uuid.uuid4().hex
        self._clock = clock
        self._lock = threading.Lock()
        self._began = self._mark = self._entered = self._stepped = clock()
        self._now = "startup"
        self._steps = 0
        self._durations: deque[float] = deque(maxlen=100)
        self._step = dict.fromkeys(PHASES, 0.0)
        self._totals = _nothing()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds inside belong to this phase; a phase within a phase takes its seconds from the outer one."""
        assert name in PHASES, f"{name!r} is not one of the phases {', '.join(PHASES)}"
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def begin(self) -> None:
        """The rank has started: it trains from here on."""
        self._enter("other")
        self._stepped = self._mark

    def end(self) -> None:
        """The rank takes no step any more."""
        self._enter(ENDED)

    def step_done(self, *, items: int, bytes: int = 0, flops: float = 0.0) -> None:
        """Close an optimiser step: what this rank contributed to it, and its seconds per phase into the histogram.

        Args:
            items: items this rank computed in the step.
            bytes: bytes this rank read from storage since the step before.
            flops: floating point operations of the model (not of recomputation) on this rank.
        """
        with self._lock:
            self._charge()
            beside = sum(spent for phase, spent in self._step.items() if state_of(phase) != "compute")
            self._durations.append(self._mark - self._stepped - beside)
            self._steps, self._stepped = self._steps + 1, self._mark
            if self._steps == 2:  # the first may have compiled for minutes; before now, a long second one would pass for a hang
                self._durations.popleft()
            self._totals["items"] += items
            self._totals["bytes"] += bytes
            self._totals["flops"] += flops
            for phase, spent in self._step.items():
                if spent:
                    self._totals["phases"][phase]["seconds"] += spent
                    self._totals["phases"][phase]["counts"][bisect_left(BUCKETS, spent)] += 1
                    self._step[phase] = 0.0

    def snapshot(self) -> Snapshot:
        """Everything so far, the running phase included: the states sum to `elapsed`, the seconds since the meter was built."""
        with self._lock:
            self._charge()
            self._totals["store_faults"] = self.store_faults()
            assert self.gauges.keys() <= RANK_GAUGES, f"gauges are {', '.join(sorted(RANK_GAUGES))}, not {', '.join(self.gauges)}"
            return {
                "rank": self._rank,
                "ranks": self._ranks,
                "stage": self._stage,
                "process": self._process,
                "host": platform.node(),
                "pid": os.getpid(),
                "elapsed": self._mark - self._began,
                "phase": self._now,
                "phase_seconds": self._mark - self._entered,
                "collective": False,
                "steps": self._steps,
                "slowest_step": max(self._durations, default=0.0),
                "totals": _sum([self._totals]),
                "gauges": dict(self.gauges),
            }

    def _enter(self, name: str) -> str:
        with self._lock:
            self._charge()
            outer, self._now, self._entered = self._now, name, self._mark
        return outer

    def _charge(self) -> None:
        now = self._clock()
        self._totals["states"][state_of(self._now)] += now - self._mark
        if self._now in PHASES:
            self._step[self._now] += now - self._mark
        self._mark = now


class Tally:
    """The sum of the meters of a run, per stage, over every process each rank ever had.

    A new process counts from 0 and what the old one had counted is kept, so no sum ever falls.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, Snapshot] = {}
        self._past: defaultdict[str, Totals] = defaultdict(_nothing)
        self._retired: set[str] = set()
        self._gauges: dict[str, dict[str, float]] = {}

    def update(self, snapshot: Snapshot) -> None:
        """Take a snapshot; one of a replaced process, or older than what is known of its process, changes nothing."""
        rank, process = snapshot["rank"], snapshot["process"]
        with self._lock:
            before = self._live.get(rank)
            if process in self._retired or (before and before["process"] == process and before["elapsed"] > snapshot["elapsed"]):
                return
            if before is None or before["process"] != process:
                self._take_over(snapshot)
            self._live[rank] = snapshot
            if rank == 0:
                self._gauges[snapshot["stage"]] = snapshot["gauges"]

    def gone(self) -> None:
        """The worker group is gone: none of its ranks is anywhere, and what they counted stays."""
        with self._lock:
            for rank in list(self._live):
                self._retire(rank)

    def stages(self) -> dict[str, Totals]:
        """The totals of every stage so far."""
        with self._lock:
            found: dict[str, list[Totals]] = {stage: [totals] for stage, totals in self._past.items()}
            for snapshot in self._live.values():
                found.setdefault(snapshot["stage"], []).append(snapshot["totals"])
        return {stage: _sum(totals) for stage, totals in found.items()}

    def gauges(self) -> dict[str, dict[str, float]]:
        """The latest global numbers of every stage, as rank 0 told them."""
        with self._lock:
            return dict(self._gauges)

    def ranks(self) -> list[Snapshot]:
        """The latest snapshot of every rank of the present worker group."""
        with self._lock:
            return list(self._live.values())

    def _take_over(self, snapshot: Snapshot) -> None:
        """A process takes its rank over; ranks that its group no longer has are gone."""
        rank = snapshot["rank"]
        for gone in [other for other in self._live if other == rank or other >= snapshot["ranks"]]:
            self._retire(gone)

    def _retire(self, rank: int) -> None:
        old = self._live.pop(rank)
        self._retired.add(old["process"])
        self._past[old["stage"]] = _sum([self._past[old["stage"]], old["totals"]])


def _nothing() -> Totals:
    phases: dict[str, PhaseTotals] = {phase: {"seconds": 0.0, "counts": [0] * (len(BUCKETS) + 1)} for phase in PHASES}
    return {"items": 0, "bytes": 0, "flops": 0.0, "store_faults": 0, "states": dict.fromkeys(STATES, 0.0), "phases": phases}


def _sum(many: Sequence[Any]) -> Any:
    """A new sum of totals: of numbers, or of lists or dictionaries of totals. A thousand ranks are summed at each scrape."""
    if isinstance(many[0], dict):
        return {key: _sum([one[key] for one in many]) for key in many[0]}
    if isinstance(many[0], list):
        return list(map(sum, zip(*many, strict=True)))
    return sum(many)
