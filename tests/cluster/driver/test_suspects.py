"""Which machines get no ranks, and until when."""

from cluster.driver.suspects import LEFT_OUT, Suspects
from tests.cluster.telemetry.test_meter import Clock


def test_a_machine_that_two_failures_name_without_progress_in_between_is_left_out_for_an_hour() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    suspects.blame("a", "h1 (10.0.0.1)")
    suspects.blame("b", "h2 (10.0.0.2)")
    suspects.blame("", "")
    suspects.blame("", "")
    assert suspects.left_out() == frozenset(), "each was named once, and nobody twice"
    suspects.blame("b", "h2 (10.0.0.2)")
    clock.now += LEFT_OUT - 1
    assert suspects.left_out() == {"b"} and suspects.why("b").startswith("h2 (10.0.0.2) gets no ranks until ")
    assert "2 failures without progress in between named it" in suspects.why("b")
    clock.now += 1
    assert suspects.left_out() == frozenset()
    suspects.blame("b", "h2 (10.0.0.2)")
    assert suspects.left_out() == {"b"}, "the ranks did not get further since"


def test_progress_clears_who_was_named_once_and_not_who_is_left_out() -> None:
    suspects = Suspects(Clock())
    for machine in ("a", "b", "b"):
        suspects.blame(machine, machine)
    suspects.forget()
    assert suspects.left_out() == {"b"}
    suspects.blame("a", "a")
    assert suspects.left_out() == {"b"}
