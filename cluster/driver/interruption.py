"""Ctrl-C and SIGTERM while ranks train: the first one lets them write a checkpoint, the second one ends at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

TERMINATED = 143
"""Exit code of a command that SIGTERM ended, as a shell has it."""


class Interruption:
    """Takes SIGINT and SIGTERM inside a `with`, where that is possible: in the main thread.

    Attributes:
        signal: the number of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.signal = 0
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
        again, self.signal = bool(self.signal), self.signal or number
        if again:
            self.end()
