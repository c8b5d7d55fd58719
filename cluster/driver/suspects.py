"""Which machines failures name again and again, and how long such a one gets no ranks where there is room without it.

A machine whose GPU or disk is broken still answers, so nobody but its failures tells.
"""

import datetime
import time
from collections import Counter
from collections.abc import Callable

TWICE = 2
"""So many failures without progress in between that name a machine are no accident."""

LEFT_OUT = 3600.0
"""Seconds for which it is left out: it may have been mended, and ranks that may be more are to grow again."""


class Suspects:
    """The machines that failures of one stage have named.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._named = Counter[str]()
        self._until: dict[str, float] = {}
        self._said: dict[str, str] = {}

    def blame(self, machine: str, name: str) -> None:
        """A failure names this machine, by Ray's id and for people; an empty id is none."""
        if not machine:
            return
        self._named[machine] += 1
        if self._named[machine] < TWICE:
            return
        self._until[machine] = self._clock() + LEFT_OUT
        until = datetime.datetime.now() + datetime.timedelta(seconds=LEFT_OUT)
        self._said[machine] = (
            f"{name} gets no ranks until {until:%H:%M} while there is room without it: {self._named[machine]} failures without progress in "
            "between named it; on other machines the last bits may be others"
        )

    def forget(self) -> None:
        """The work got further than it ever was: who is left out stays so, and who was named once was not to blame."""
        self._named.clear()

    def left_out(self) -> frozenset[str]:
        """The machines that get no ranks now where there is room without them."""
        return frozenset(machine for machine, until in self._until.items() if self._clock() < until)

    def why(self, machine: str) -> str:
        """Which machine is left out, until when and why, in a line."""
        return self._said[machine]
