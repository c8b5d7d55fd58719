"""A question to a cluster or a store that is asked again and again beside other work, which goes on where neither answers."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Poller(Generic[T]):
    """Asks in a thread of its own, one question at a time.

    Args:
        ask: the question.
        every: seconds between two.
        silence: what it raises where there is no answer.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        ask: Callable[[], T],
        every: float,
        *silence: type[Exception],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ask, self._every, self._silence, self._clock = ask, every, silence, clock
        self._asked, self._answers = 0.0, list[T]()
        self._thread: Thread | None = None

    def answer(self) -> T | None:
        """What was answered since the last call, None if nothing was; asks again when it is time."""
        if self._thread and self._thread.is_alive():
            return None
        answer = self._answers.pop() if self._answers else None
        if self._clock() - self._asked >= self._every:
            self._asked = self._clock()
            self._thread = Thread(target=self._run, name="poller", daemon=True)  # nobody waits for its end
            self._thread.start()
        return answer

    def _run(self) -> None:
        with suppress(*self._silence):
            self._answers.append(self._ask())
