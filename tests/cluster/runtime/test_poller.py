"""Questions to a cluster that may not answer."""

import time
from threading import Event

from cluster.runtime.poller import Poller


def soon(poller: Poller[int]) -> int:
    while (answer := poller.answer()) is None:
        time.sleep(0.001)
    return answer


def test_a_question_without_an_answer_holds_up_nobody_and_is_not_asked_twice() -> None:
    asked, head = [0], Event()

    def ask() -> int:
        asked[0] += 1
        head.wait()
        return asked[0]

    poller = Poller(ask, 0.0, OSError)
    assert [poller.answer() for _ in range(100)] == [None] * 100 and asked == [1]
    head.set()
    assert soon(poller) == 1
    assert soon(poller) == 2, "and it is asked again"


def test_it_asks_when_it_is_time() -> None:
    now, asked = [100.0], [0]

    def ask() -> int:
        asked[0] += 1
        return asked[0]

    poller = Poller(ask, 2.0, OSError, clock=lambda: now[0])
    assert soon(poller) == 1
    for _ in range(20):
        assert poller.answer() is None
    now[0] += 2
    assert soon(poller) == 2 and asked == [2]
