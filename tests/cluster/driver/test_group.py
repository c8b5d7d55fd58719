"""What a group of ranks is asked for, and when one reason gives way to another."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from cluster.driver import group as module
from cluster.driver.group import Group
from cluster.training.requests import Request


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """A group on two machines whose ranks are not heard."""

    def silent(*_: object) -> None:
        raise RayError

    made = object.__new__(Group)
    made.reason, made.why, made.hang = "", "", None
    made._place, made._names = ["a", "b"], {"a": "host-a"}
    made._assert_ours, made._enough = lambda: None, lambda: ""
    made._interruption = SimpleNamespace(signal=0)  # type: ignore[assignment]
    made._monitor = SimpleNamespace(say=lambda text: None)  # type: ignore[assignment]
    made._board = SimpleNamespace(take=SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(module.ray, "get", silent)
    return made


def look(group: Group, leaving: list[str], room: int) -> tuple[str, Request]:
    group._lookout = SimpleNamespace(answer=lambda: (leaving, room))  # type: ignore[assignment]
    group._look()
    return group.reason, group._request()


def test_a_group_that_waits_for_its_next_checkpoint_to_grow_still_hears_that_a_machine_goes(group: Group) -> None:
    assert look(group, [], 2) == ("", Request.NOTHING)
    assert look(group, [], 3) == ("resized", Request.LEAVE_AT_CHECKPOINT)
    assert look(group, ["a"], 3) == ("preempted", Request.LEAVE) and group.why == "host-a will be taken away"
    assert look(group, [], 3) == ("preempted", Request.LEAVE), "and goes on leaving"


def test_and_that_its_run_has_come_far_enough(group: Group) -> None:
    look(group, [], 3)
    group._enough = lambda: "another trial is better"
    assert look(group, [], 3) == ("enough", Request.LEAVE)
