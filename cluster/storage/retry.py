"""How long trouble is put up with: the pauses between the tries of one thing, and what ends them early."""

import random
import threading
import time
from collections.abc import Callable

MAX_BACKOFF_SECONDS = 8.0
"""Seconds between two tries, at most."""

_work = threading.local()


def cancel_retries_on(over: threading.Event) -> None:
    """Once this event is set, the present thread tries nothing again."""
    _work.over = over


class Retry:
    """The tries of one thing. Its time runs from the first fault on: a request that works for long is no trouble.

    Attributes:
        faults: how many there were.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.faults = 0
        self._clock, self._begun = clock, 0.0

    def again(self, seconds: float) -> bool:
        """Whether to try again after this fault; returns after a pause if so.

        The pause is random, below a bound that doubles: many ranks that failed together do not come back together.

        Args:
            seconds: that faults are put up with, counted from the first.
        """
        now, over = self._clock(), getattr(_work, "over", None) or threading.Event()
        if not self.faults:
            self._begun = now
        self.faults += 1
        if now - self._begun >= seconds:
            return False
        return not over.wait(random.SystemRandom().uniform(0, min(MAX_BACKOFF_SECONDS, 0.1 * 2**self.faults)))
