"""What is done beside the work of a block is done again and again, and is over with it, also after an error."""

import threading

import pytest

from cluster.telemetry.repeating import repeating


def test_it_is_done_again_and_again_and_is_over_with_the_block_also_after_an_error() -> None:
    thrice, count = threading.Event(), [0]

    def act() -> None:
        count[0] += 1
        if count[0] == 3:
            thrice.set()

    with pytest.raises(ValueError, match="of the block"), repeating(act, 0.001, "counting"):
        assert thrice.wait(60)
        assert "counting" in [thread.name for thread in threading.enumerate()]
        raise ValueError("of the block")
    assert "counting" not in [thread.name for thread in threading.enumerate()]


def test_an_error_is_said_and_the_next_time_comes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    thrice, count = threading.Event(), [0]

    def act() -> None:
        count[0] += 1
        if count[0] == 3:
            thrice.set()
        raise KeyError("odd")

    with repeating(act, 0.001, "counting"):
        assert thrice.wait(60)
    assert "counting: tried again in 0.001 s" in caplog.text and "KeyError: 'odd'" in caplog.text
