"""What is said of a cluster that does not answer."""

import logging
import threading

import pytest

from cluster.runtime import nodes
from cluster.runtime.nodes import waited_for


def test_a_head_that_is_silent_is_waited_for_and_it_is_said_since_when(caplog: pytest.LogCaptureFixture) -> None:
    now, asked, said = [0.0], threading.Event(), list[int]()

    def clock() -> float:
        """Ten seconds go by at each look; the head answers after two minutes."""
        now[0] += 10
        said.append(len(caplog.records))
        if now[0] >= 130:
            asked.set()
        return now[0]

    with caplog.at_level(logging.WARNING):
        assert waited_for(lambda: asked.wait() and "here", clock) == "here"
    assert "the head of the cluster has not answered since" in caplog.text and "it is waited for" in caplog.text
    assert said[1] == 0 and said[3] == 1 and max(said) <= 3, "after ten seconds, then once a minute"
    assert caplog.records[-1].getMessage().startswith("the head of the cluster answers again")


def test_nothing_is_said_of_one_that_answers(caplog: pytest.LogCaptureFixture) -> None:
    assert waited_for(lambda: "here") == "here"
    with pytest.raises(nodes.ray.exceptions.RayError):
        waited_for(failing)
    assert not caplog.records


def failing() -> None:
    raise nodes.ray.exceptions.RayError
