"""A process that answers a call ends if the call gets stuck, with the stacks of its threads in its log: who called it calls another one.

Ranks are watched otherwise (cluster/driver/watchdog.py): they tell each second where they are. A call has nobody who watches.
"""

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

_allowed: list[float] = []
"""Seconds that the call of this process may take for a piece of its work; empty where there is none."""

_armed: list[float] = []
"""When the timer was armed last."""


@contextmanager
def ended_if_stuck(seconds: float) -> Iterator[None]:
    """End this process if the block neither ends nor is `alive` for so long."""
    _allowed[:] = [seconds]
    _armed.clear()
    alive()
    try:
        yield
    finally:
        _allowed.clear()
        faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """The call that this process answers has got on by a piece of its work; where there is no call, nothing happens."""
    now = time.monotonic()
    for seconds in _allowed:
        if _armed and now - _armed[0] < min(1.0, seconds / 10):  # to arm it starts a thread
            return
        _armed[:] = [now]
        faulthandler.dump_traceback_later(seconds, exit=True)  # a timer in C: it works whoever holds the interpreter's lock
