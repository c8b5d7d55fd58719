"""Questions to a cluster that may not answer."""

import time
from threading import Event

from cluster.runtime.lookout import Lookout


def soon(lookout: Lookout[int]) -> int:
    while (answer := lookout.answer()) is None:
        time.sleep(0.001)
    return answer


def test_a_question_without_an_answer_holds_up_nobody_and_is_not_asked_twice() -> None:
    asked, head = [0], Event()

    def ask() -> int:
        asked[0] += 1
        head.wait()
        return asked[0]

    lookout = Lookout(ask, 0.0, OSError)
    assert [lookout.answer() for _ in range(100)] == [None] * 100 and asked == [1]
    head.set()
    assert soon(lookout) == 1
    assert soon(lookout) == 2, "and it is asked again"


def test_it_asks_when_it_is_time() -> None:
    now, asked = [100.0], [0]

    def ask() -> int:
        asked[0] += 1
        return asked[0]

    lookout = Lookout(ask, 2.0, OSError, clock=lambda: now[0])
    assert soon(lookout) == 1
    for _ in range(20):
        assert lookout.answer() is None
    now[0] += 2
    assert soon(lookout) == 2 and asked == [2]
