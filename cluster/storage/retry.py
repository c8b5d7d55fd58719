"""Retry with exponential backoff and full jitter: a random pause between two tries, below a bound that doubles with each fault.

Random, so that many ranks whose requests failed together do not come back together. A thread's retries can be cancelled: one that
waits in a pause gives up at once.
"""

import random
import threading
import time
from collections.abc import Callable

MAX_BACKOFF_SECONDS = 8.0
"""Longest pause between two tries, in seconds."""

_local = threading.local()
_counted, _lock = [0], threading.Lock()


def cancel_retries_on(event: threading.Event) -> None:
    """Once this event is set, the calling thread retries nothing and does not wait for a retry."""
    _local.cancel = event


def store_faults() -> int:
    """How often a request of this process failed so far where to try again may help."""
    return _counted[0]


class Retry:
    """The retries of one request or read. Their time limit counts from the first fault, not from the beginning of the request.

    Args:
        clock: seconds that only grow.

    Attributes:
        faults: how many there were.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.faults = 0
        self._clock, self._first_fault = clock, 0.0

    def again(self, seconds: float) -> bool:
        """Whether to try again after this fault; if so, returns after the pause.

        Args:
            seconds: time limit of all retries, counted from the first fault.
        """
        now, cancel = self._clock(), getattr(_local, "cancel", None) or threading.Event()
        if not self.faults:
            self._first_fault = now
        self.faults += 1
        with _lock:
            _counted[0] += 1
        if now - self._first_fault >= seconds:
            return False
        return not cancel.wait(random.SystemRandom().uniform(0, min(MAX_BACKOFF_SECONDS, 0.1 * 2**self.faults)))
