"""Deadlines for calls that wait for a server: a thread of its own ends what is not done in time.

A socket's timeout does not: it counts from the last byte, so a server that sends one now and then never exceeds it.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deadlines:
    """Calls a function for everything that is not done by its deadline; one thread for all, which starts with the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[float, Callable[[], object]]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = float("inf")

    @contextmanager
    def within(self, seconds: float, end: Callable[[], object]) -> Iterator[None]:
        """A deadline for the body of a `with`.

        Args:
            seconds: from now to the deadline.
            end: called at the deadline, from another thread, if the body is not done. What it raises is ignored: the body may just
                have ended.
        """
        number = next(self._numbers)
        with self._changed:
            deadline = self._clock() + seconds
            self._pending[number] = deadline, end
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            elif deadline < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._pending.pop(number, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                now = self._clock()
                late = [number for number, (deadline, _) in self._pending.items() if deadline <= now]
                ends = [self._pending.pop(number)[1] for number in late]
                if not ends:
                    soonest = min((deadline for deadline, _ in self._pending.values()), default=None)
                    self._wakes_at = float("inf") if soonest is None else soonest
                    self._changed.wait(None if soonest is None else soonest - now)
            for end in ends:
                try:
                    end()
                except Exception:
                    pass
