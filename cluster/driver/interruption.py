"""Ctrl-C and SIGTERM while ranks train: the first one lets them write a checkpoint, the second one ends at once."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

TERMINATED = 143
"""Exit code of a command that SIGTERM ended, as a shell has it."""


SAME = 1.0
"""Seconds in which a second signal is the first one again: `ray job stop` sends it to a whole tree of processes, and they hand it on."""


class Enough(Exception):
    """The run was told that it has come far enough: it ends before its end, and says why."""


def never() -> str:
    """Why a run has come far enough that goes to its end: nothing."""
    return ""


class Interruption:
    """Takes SIGINT and SIGTERM inside a `with`, where that is possible: in the main thread.

    Args:
        clock: seconds that only grow.

    Attributes:
        signal: the number of the first signal, 0 before it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal = 0
        self._clock, self._first = clock, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Raise what ends a command after the signal that came.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with its exit code.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._first = number, self._clock()
        elif self._clock() - self._first > SAME:
            self.end()
