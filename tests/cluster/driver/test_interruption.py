"""Signals while ranks train: the first is noted, the second ends; both as a shell expects it."""

import os
import signal
import threading

import pytest

from cluster.driver.interruption import Interruption


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(number: signal.Signals, end: type[BaseException]) -> None:
    before, now = signal.getsignal(number), [0.0]
    with Interruption(lambda: now[0]) as interruption:
        assert interruption.signal == 0
        os.kill(os.getpid(), number)
        assert interruption.signal == number
        now[0] = 0.5
        os.kill(os.getpid(), number)  # the same one, handed on by another process
        now[0] = 2.0
        with pytest.raises(end):
            os.kill(os.getpid(), number)
        with pytest.raises(end) as raised:
            interruption.end()
    assert signal.getsignal(number) is before
    assert number == signal.SIGINT or raised.value.code == 143  # type: ignore[attr-defined]


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
