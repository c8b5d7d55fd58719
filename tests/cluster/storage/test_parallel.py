"""Calls run in parallel, their results keep their order, and only so many are made ahead."""

import threading

import pytest

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
    assert set(range(5)) <= set(calls) <= set(range(9))


def test_while_an_answer_is_used_the_next_ones_are_asked_for_and_no_others() -> None:
    asked, changed = list[int](), threading.Condition()

    def ask(number: int) -> int:
        with changed:
            asked.append(number)
            changed.notify_all()
        return number

    for number in parallel_map(ask, range(9), ahead=3):
        with changed:
            assert changed.wait_for(lambda: len(asked) >= min(number + 4, 9), timeout=60)  # noqa: B023
            assert sorted(asked) == list(range(min(number + 4, 9)))


def test_an_error_comes_in_its_place_and_ends_the_calls() -> None:
    def ask(number: int) -> int:
        if number == 2:
            raise KeyError(number)
        return number

    answers = parallel_map(ask, range(1000), ahead=1)
    assert [next(answers), next(answers)] == [0, 1]
    with pytest.raises(KeyError):
        next(answers)
