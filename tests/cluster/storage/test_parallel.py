"""Calls run in parallel, their results keep their order, and only so many are made ahead."""

import threading

from cluster.storage.parallel import PARALLEL_REQUESTS, parallel_map


def test_answers_come_in_order_though_several_wait_at_the_same_time() -> None:
    together = threading.Barrier(PARALLEL_REQUESTS, timeout=60)

    def ask(number: int) -> int:
        together.wait()
        return number * number

    assert list(parallel_map(ask, range(3 * PARALLEL_REQUESTS))) == [number * number for number in range(3 * PARALLEL_REQUESTS)]


def test_closing_the_iterator_early_makes_few_more_calls() -> None:
    calls: list[int] = []

    def ask(number: int) -> int:
        calls.append(number)
        return number

    answers = parallel_map(ask, range(100), ahead=4)
    assert [next(answers) for _ in range(5)] == [0, 1, 2, 3, 4]
    del answers
    assert set(range(5)) <= set(calls) <= set(range(8))
