"""Ends what takes too long, from a thread of its own: a server that trickles trips no socket's timeout."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deadlines:
    """Calls back for whatever is not over in time; one thread for all, which starts with the first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._numbers = itertools.count()
        self._watched: dict[int, tuple[float, Callable[[], object]]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes = float("inf")

    @contextmanager
    def within(self, seconds: float, end: Callable[[], object]) -> Iterator[None]:
        """What is not done after so many seconds is ended by this call, which may raise: then it was just over."""
        number = next(self._numbers)
        with self._changed:
            deadline = self._clock() + seconds
            self._watched[number] = deadline, end
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            elif deadline < self._wakes:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(number, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = self._clock()
                late = [number for number, (deadline, _) in self._watched.items() if deadline <= now]
                ends = [self._watched.pop(number)[1] for number in late]
                if not ends:
                    soonest = min((deadline for deadline, _ in self._watched.values()), default=None)
                    self._wakes = float("inf") if soonest is None else soonest
                    self._changed.wait(None if soonest is None else soonest - now)
            for end in ends:
                try:
                    end()
                except Exception:
                    pass
