"""The meter of one rank: what it did and where its seconds went, as numbers that only grow.

Nothing but the standard library is imported, so that a rank builds its meter before torch: the account opens there, and from
then on every second lies in exactly one goodput state.
"""

import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypedDict

PHASES = {"data_wait": "data_wait", "forward": "compute", "backward": "compute", "optimizer": "compute", "checkpoint": "checkpoint"}
"""The phases of a step, each with the goodput state its seconds fall in."""

STATES = ("startup", "data_wait", "compute", "checkpoint", "other")
"""Goodput states: `startup` lasts until the first phase, `other` is whatever lies outside the phases after it."""

GAUGES = ("progress_items", "loss", "gradient_norm", "learning_rate", "peak_memory_bytes", "peak_flops")
"""What a rank may set in `Meter.gauges`; the first four are the step's global numbers, the last two this rank's own."""

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
    states: dict[str, float]
    phases: dict[str, PhaseTotals]


class Snapshot(TypedDict):
    """A meter's state in plain JSON types; `process` tells one meter from the one that replaces it after a restart."""

    rank: int
    ranks: int
    stage: str
    process: str
    elapsed: float
    totals: Totals
    gauges: dict[str, float]


class Meter:
    """Counts for one rank in one stage; a snapshot may be taken from another thread at any moment.

    Attributes:
        gauges: the latest value of any of `GAUGES`.
    """

    def __init__(self, rank: int, ranks: int, stage: str, clock: Callable[[], float] = time.monotonic):
        self.gauges: dict[str, float] = {}
        self._rank, self._ranks, self._stage = rank, ranks, stage
        self._process = uuid.uuid4().hex
        self._clock = clock
        self._lock = threading.Lock()
        self._began = self._mark = clock()
        self._now = "startup"
        self._seconds = dict.fromkeys(("startup", *PHASES, "other"), 0.0)
        self._in_steps = dict.fromkeys(PHASES, 0.0)
        self._counts = {phase: [0] * (len(BUCKETS) + 1) for phase in PHASES}
        self._items, self._bytes, self._flops = 0, 0, 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds inside belong to this phase; a phase within a phase takes its seconds from the outer one."""
        assert name in PHASES, f"{name!r} is not one of the phases {', '.join(PHASES)}"
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter("other" if outer == "startup" else outer)

    def step_done(self, *, items: int, bytes: int = 0, flops: float = 0.0) -> None:
        """Close an optimiser step: what this rank contributed to it, and its seconds per phase into the histogram.

        Args:
            items: items this rank computed in the step.
            bytes: bytes this rank read from storage since the step before.
            flops: floating point operations of the model (not of recomputation) on this rank.
        """
        with self._lock:
            self._charge()
            self._items += items
            self._bytes += bytes
            self._flops += flops
            for phase, counts in self._counts.items():
                if spent := self._seconds[phase] - self._in_steps[phase]:
                    counts[bisect_left(BUCKETS, spent)] += 1
                    self._in_steps[phase] = self._seconds[phase]

    def snapshot(self) -> Snapshot:
        """Everything so far, the running phase included: the states sum to `elapsed`, the seconds since the meter was built."""
        with self._lock:
            self._charge()
            assert self.gauges.keys() <= set(GAUGES), f"gauges are {', '.join(GAUGES)}, not {', '.join(self.gauges)}"
            states = dict.fromkeys(STATES, 0.0)
            for name, seconds in self._seconds.items():
                states[PHASES.get(name, name)] += seconds
            phases: dict[str, PhaseTotals] = {
                phase: {"seconds": self._in_steps[phase], "counts": list(counts)} for phase, counts in self._counts.items()
            }
            return {
                "rank": self._rank,
                "ranks": self._ranks,
                "stage": self._stage,
                "process": self._process,
                "elapsed": self._mark - self._began,
                "totals": {"items": self._items, "bytes": self._bytes, "flops": self._flops, "states": states, "phases": phases},
                "gauges": dict(self.gauges),
            }

    def _enter(self, name: str) -> str:
        with self._lock:
            self._charge()
            outer, self._now = self._now, name
        return outer

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._now] += now - self._mark
        self._mark = now
