"""A question to Ray that is asked again and again beside other work: without its head a cluster does not answer, and training goes on."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Generic, TypeVar

from ray.exceptions import RayError

T = TypeVar("T")


class Lookout(Generic[T]):
    """Asks in a thread of its own, one question at a time.

    Args:
        ask: the question.
        every: seconds between two.
        clock: seconds that only grow.
    """

    def __init__(self, ask: Callable[[], T], every: float, clock: Callable[[], float] = time.monotonic):
        self._ask, self._every, self._clock = ask, every, clock
        self._asked, self._answers = 0.0, list[T]()
        self._thread: Thread | None = None

    def answer(self) -> T | None:
        """What was answered since the last call, None if nothing was; asks again when it is time."""
        if self._thread and self._thread.is_alive():
            return None
        answer = self._answers.pop() if self._answers else None
        if self._clock() - self._asked >= self._every:
            self._asked = self._clock()
            self._thread = Thread(target=self._run, name="lookout", daemon=True)  # nobody waits for its end
            self._thread.start()
        return answer

    def _run(self) -> None:
        with suppress(RayError):
            self._answers.append(self._ask())
