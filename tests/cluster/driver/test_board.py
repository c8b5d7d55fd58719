"""What ranks, driver and Ray Train's controller hear of each other."""

from typing import Any

import pytest

from cluster.driver import board as module
from cluster.driver.board import Board
from cluster.training.requests import Request


@pytest.fixture
def board() -> Any:
    """The actor's own object, without a process."""
    return Board.__ray_metadata__.modified_class()


def snapshot(rank: int, elapsed: float = 0.0) -> dict[str, Any]:
    return {"rank": rank, "elapsed": elapsed}


def test_ranks_of_an_attempt_that_is_over_are_not_heard(board: Any) -> None:
    board.begin(3)
    board.post(3, snapshot(0))
    board.begin(4)
    assert board.post(3, snapshot(0, 99.0)) == Request.NOTHING and board.take(Request.LEAVE) == ([], None)
    assert board.post(4, snapshot(1)) == Request.LEAVE and board.take(Request.LEAVE)[0] == [snapshot(1)]


def test_a_failure_is_taken_once_and_waits_for_its_own_decision(board: Any) -> None:
    board.failed(b"first")
    assert board.decided() is None and board.take(Request.NOTHING)[1] == b"first" and board.take(Request.NOTHING)[1] is None
    board.decide(True)
    assert board.decided() is True
    board.failed(b"second")
    assert board.decided() is None, "the answer to the first is not one to the second"


def test_who_asks_a_driver_that_has_left_is_told_that_nothing_starts_again(board: Any) -> None:
    board.failed(b"first")
    board.close()
    assert board.decided() is False
    board.failed(b"second")
    assert board.decided() is False


def test_what_ray_had_not_given_yet_and_what_it_had_back_is_not_held(board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 30.0, 32.5, 60.0])
    monkeypatch.setattr(module.time, "time", lambda: next(times))
    board.asked()
    board.placed(0.5)
    assert board.places() == (10.0, 0.5, 0.0)
    board.given_back()
    assert board.places() == (10.0, 0.5, 30.0)
    board.asked()
    board.placed(0.25)
    assert board.places() == (10.0, 0.5 + 2.5 + 0.25, 0.0)
    board.given_back()
    assert board.places() == (10.0, 3.25, 60.0)
