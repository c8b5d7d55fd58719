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


def test_a_failure_is_told_with_its_rank_its_host_and_the_step_it_came_after(group: Group) -> None:
    lost, whole = RuntimeError("gone"), RuntimeError("Connection closed by peer")
    group._job = SimpleNamespace(stage="diffusion", experiment=SimpleNamespace(optim=SimpleNamespace(batch={"diffusion": 8})))  # type: ignore[assignment]
    group._progress = 0.0
    assert group.where(RuntimeError("no ranks in it"), lost) == ""
    group._progress = 603.0
    failed = RuntimeError("two ranks")
    failed.worker_failures = {0: whole, 1: lost}  # type: ignore[attr-defined]
    assert group.where(failed, lost) == "rank 1, host b, after step 76 (603 items)"
    assert group.where(failed, whole) == "a peer of rank 0, host host-a, after step 76 (603 items)"
    group.hang = object()  # type: ignore[assignment]
    assert group.where(failed, lost) == "after step 76 (603 items)", "the hang says whom it means"


def test_a_group_that_waits_for_its_next_checkpoint_to_grow_still_hears_that_a_machine_goes(group: Group) -> None:
    assert look(group, [], 2) == ("", Request.NOTHING)
    assert look(group, [], 3) == ("resized", Request.LEAVE_AT_CHECKPOINT)
    assert look(group, ["a"], 3) == ("preempted", Request.LEAVE) and group.why == "host-a will be taken away"
    assert look(group, [], 3) == ("preempted", Request.LEAVE), "and goes on leaving"


def test_and_that_its_run_has_come_far_enough(group: Group) -> None:
    look(group, [], 3)
    group._enough = lambda: "another trial is better"
    assert look(group, [], 3) == ("enough", Request.LEAVE)
