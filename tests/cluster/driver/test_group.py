"""What a group of ranks is asked for, and when one reason gives way to another."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.driver import board_client
from cluster.driver import group as module
from cluster.driver.board_client import BoardClient
from cluster.driver.group import Elsewhere, Group
from cluster.driver.watchdog import Hang
from cluster.runtime.autoscaler import Autoscaler
from cluster.runtime.failures import StageFailed
from cluster.runtime.nodes import Node
from cluster.runtime.placement import Gang
from cluster.storage import open_store
from cluster.training.requests import Request
from tests.cluster.telemetry.test_meter import Clock


def client(board: object, say: Callable[[str], None] = lambda text: None) -> BoardClient:
    """Of a board that has answered before."""
    made = BoardClient(board, say)
    made._answered()
    return made


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """A group on two machines whose ranks are not heard."""

    def silent(question: object, timeout: float) -> None:  # nothing is asked without one
        raise RayError

    made = object.__new__(Group)
    made.reason, made.why, made.hang, made._killed, made._blamed, made._elsewhere = "", "", None, None, None, False
    made._heard = {}
    made._place, made._names = ["a", "b"], {"a": "host-a"}
    made._assert_ours, made._enough = lambda: None, lambda: ""
    made._interruption = SimpleNamespace(signal=0)  # type: ignore[assignment]
    made._monitor = SimpleNamespace(say=lambda text: None)  # type: ignore[assignment]
    made._board = client(SimpleNamespace(**{name: SimpleNamespace(remote=lambda *_: None) for name in ("take", "decide", "close")}))
    made._growth, made._growing, made._grows = None, Lock(), True
    monkeypatch.setattr(board_client.ray, "get", silent)
    return made


def look(group: Group, leaving: list[str], room: int) -> tuple[str, Request]:
    group._poller = SimpleNamespace(answer=lambda: (leaving, room))  # type: ignore[assignment]
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


def test_a_failure_names_the_machine_of_the_rank_that_shows_it_or_of_those_that_hang_and_of_several_none(group: Group) -> None:
    broken, told = RuntimeError("CUDA error: uncorrectable ECC error encountered"), RuntimeError("Connection closed by peer")
    gone = WorkerHealthCheckFailedError("Worker unexpectedly exits with a connection error code 2. End of file", failure=ValueError())
    failed = RuntimeError("two ranks")
    failed.worker_failures = {0: broken, 1: told}  # type: ignore[attr-defined]
    assert group.to_blame(failed, broken) == ("a", "host-a")
    assert group.to_blame(failed, told) == ("", ""), "who was told of it is not who is to blame"
    assert group.to_blame(RuntimeError("no ranks in it"), broken) == ("", "")
    died = WorkerGroupError("a process is gone", {0: told, 1: gone})
    assert group.to_blame(died, gone) == ("b", "b"), "Ray's own connections are to the rank itself"
    for blamed, host in (([1], "b"), ([0, 1], ""), ([], "")):
        group._blamed = blamed
        assert group.to_blame(failed, broken) == (host, host), "a hang says itself whom it means, and a board that is gone means nobody"


def there(name: str, free: float) -> Node:
    return Node(name, f"10.0.0.{name}", name, {}, {"CPU": 1.0}, {"CPU": free})


@pytest.mark.parametrize(("spare", "avoided", "elsewhere"), [(1.0, "b", True), (0.0, "b", False), (1.0, "", False), (1.0, "c", False)])
def test_ranks_that_failed_on_a_machine_that_is_avoided_start_elsewhere_where_there_is_room(
    spare: float, avoided: str, elsewhere: bool, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided, begun = list[bool](), list[bool]()
    group._gang = Gang(2, 2, {"CPU": 1.0}, avoid=lambda: frozenset(avoided))
    group._board.actor.decide = SimpleNamespace(remote=decided.append)
    monkeypatch.setattr(module, "nodes", lambda: [there("a", 0.0), there("b", 0.0), there("c", spare)])
    monkeypatch.setattr(module, "listens", lambda *_: True)
    monkeypatch.setattr(group, "_begin", lambda: begun.append(True))
    error = WorkerGroupError("a rank died", {1: RuntimeError("gone")})
    group._decide(error, lambda *_: None)
    assert (decided, begun) == ([not elsewhere], [True] * (not elsewhere))
    monkeypatch.setattr(module, "Fit", Left)
    monkeypatch.setattr(Left, "error", error)
    monkeypatch.setattr(group, "_book_places", lambda: None)
    group._job = None  # type: ignore[assignment]
    with pytest.raises(Elsewhere if elsewhere else WorkerGroupError):
        group.train("", lambda *_: None)


def test_a_group_that_waits_for_its_next_checkpoint_to_grow_still_hears_that_a_machine_goes(group: Group) -> None:
    assert look(group, [], 2) == ("", Request.NOTHING)
    assert look(group, [], 3) == ("resized", Request.LEAVE_AT_CHECKPOINT)
    assert look(group, ["a"], 3) == ("preempted", Request.LEAVE) and group.why == "host-a will be taken away"
    assert look(group, [], 3) == ("preempted", Request.LEAVE), "and goes on leaving"


def test_a_group_stays_whose_room_to_grow_is_gone_again_before_its_next_checkpoint(group: Group) -> None:
    assert look(group, [], 3) == ("resized", Request.LEAVE_AT_CHECKPOINT)
    assert look(group, [], 2) == ("", Request.NOTHING) and group.why == ""
    assert look(group, [], 4) == ("resized", Request.LEAVE_AT_CHECKPOINT) and group.why == "there is room for 2 more ranks"


class Left:
    """Ray Train, whose ranks have left at a checkpoint."""

    error, value = None, {"left": True}

    def __init__(self, *_: object):
        """Start nothing."""

    def start(self) -> None:
        """Nothing to start."""

    def is_alive(self) -> bool:
        return False

    def end(self) -> None:
        """Nothing to end."""


def test_ranks_that_had_left_when_the_room_was_found_gone_start_again(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Fit", Left)
    group._job = group._gang = group._berths = None  # type: ignore[assignment]
    monkeypatch.setattr(group, "_book_places", lambda: None)
    assert group.train("", lambda *_: None) == {"left": True}
    assert (group.reason, group.why) == ("resized", "there was room for more ranks")


def test_and_that_its_run_has_come_far_enough(group: Group) -> None:
    look(group, [], 3)
    group._enough = lambda: "another trial is better"
    assert look(group, [], 3) == ("enough", Request.LEAVE)


def test_ranks_that_were_killed_and_are_not_missed_by_ray_train_end_the_run_with_the_reason(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group._job = SimpleNamespace(stage="diffusion", life=1, attempt=0, run=open_store(str(tmp_path)))  # type: ignore[assignment]
    clock, hang = Clock(0.0), group._hung(Hang("rank 1 does not get on"))
    monkeypatch.setattr(module.time, "monotonic", clock)
    monkeypatch.setattr(group, "_examine", lambda *_, **__: None)
    group._kill("logs", [1], hang)
    clock.now = module.NOTICED
    assert look(group, [], 2)[0] == "", "it may still notice"
    clock.now += 1
    with pytest.raises(StageFailed, match=r"\(hang\): Hang: rank 1 does not get on"):
        group._look()
    assert (tmp_path / "logs/000001.0/diffusion-end.txt").read_text() == f"{hang}\n"
    with suppress(RayError):
        group._decide(RuntimeError("it did notice"), lambda *_: None)
    group._look()


def test_ranks_that_nobody_hears_any_more_are_killed_so_that_they_start_again(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def gone(question: object, timeout: float) -> None:
        raise ActorDiedError

    monkeypatch.setattr(board_client.ray, "get", gone)
    monkeypatch.setattr(group, "_examine", lambda folder, ranks, kill: killed.extend(ranks))
    group._job = SimpleNamespace(stage="diffusion", life=1, attempt=0, run=open_store(str(tmp_path)))  # type: ignore[assignment]
    with pytest.raises(StageFailed, match=r"stage diffusion failed \(lost\)"):
        look(group, [], 2)  # none was heard of: nobody knows whom to kill
    group._heard = {0: {}, 1: {}}  # type: ignore[dict-item]
    look(group, [], 2)
    look(group, [], 2)
    assert killed == [0, 1], "once"


class Deaf:
    """A board whose process is stopped: it answers what it was asked when it goes on, and dies of being killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[str] = []
        self.killed = 0
        self.answers: dict[str, object] = {}
        monkeypatch.setattr(board_client.ray, "get", self.get)
        monkeypatch.setattr(board_client.ray, "kill", self.kill)

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: self.asked.append(name) or name)

    def get(self, question: str, timeout: float) -> object:
        if self.killed:
            raise ActorDiedError
        if question not in self.answers:
            raise GetTimeoutError
        return self.answers[question]

    def kill(self, board: object) -> None:
        assert board is self
        self.killed += 1


def test_a_board_that_does_not_answer_is_waited_for_asked_once_and_after_a_minute_takes_the_way_of_a_dead_one(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, given_up = list[str](), list[RayError]()
    board = Deaf(monkeypatch)
    group._board = client(board, said.append)
    monkeypatch.setattr(group, "_give_up_unheard", given_up.append)
    for _ in range(int(60 / board_client.ANSWER) - 1):
        look(group, [], 2)
    assert board.asked == ["take"], "what it takes of an answer that nobody waits for would be lost"
    assert len(said) == 1 and "has not answered since" in said[0] and not board.killed
    look(group, [], 2)
    assert board.killed == 1 and "has not answered for 60 s: killing it" in said[1] and not given_up
    look(group, [], 2)
    assert len(given_up) == 1 and board.asked == ["take"]


def test_a_board_that_answers_late_is_heard(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Deaf(monkeypatch)
    group._board = client(board)
    group._poller = SimpleNamespace(answer=lambda: None)  # type: ignore[assignment]
    group._berths, group._goes_on_from = [], 0
    group._monitor = SimpleNamespace(say=lambda text: None, hold=lambda *_: None)  # type: ignore[assignment]
    for _ in range(2):
        for _ in range(int(60 / board_client.ANSWER) - 1):
            assert group._look() is None
        board.answers = {"take": ([], cloudpickle.dumps(RuntimeError("a rank failed meanwhile"))), "places": (0.0, 0.0, 0.0)}
        assert str(group._look()) == "a rank failed meanwhile"
        board.answers.clear()
    assert not board.killed and board.asked == ["take", "places"] * 2


def test_at_the_end_nobody_waits_for_a_board_that_does_not_answer(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Deaf(monkeypatch)
    group._board = client(board)
    look(group, [], 2)
    group._book_places()
    assert board.asked == ["take"]


def test_no_room_is_reserved_for_a_group_that_has_ended_while_its_poller_was_on_its_way(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[Gang] = []

    def draining() -> list[str]:
        group._withdraw_growth()
        return []

    group._gang, group._heard = Gang(2, 4, {"CPU": 1.0}), {0: {}, 1: {}}  # type: ignore[dict-item]
    monkeypatch.setattr(module, "autoscaler", Autoscaler)
    monkeypatch.setattr(module, "Demand", lambda gang, ranks: reserved.append(gang))
    monkeypatch.setattr(group, "_room", lambda: 2)
    monkeypatch.setattr(module, "draining_nodes", list)
    assert group._ask_of_machines() == ([], 2) and len(reserved) == 1
    group._growth = None
    monkeypatch.setattr(module, "draining_nodes", draining)
    assert group._ask_of_machines() == ([], 0) and len(reserved) == 1


def test_room_to_grow_is_reserved_only_where_an_autoscaler_is_to_see_it(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run gives back for a moment, to start with more ranks itself, would go to the reservation."""
    scalers, reserved = list[Autoscaler | None]([None, None, Autoscaler()]), list[int]()
    group._gang, group._heard = Gang(2, 4, {"CPU": 1.0}), {0: {}, 1: {}}  # type: ignore[dict-item]
    monkeypatch.setattr(module, "autoscaler", lambda: scalers.pop(0))
    monkeypatch.setattr(module, "Demand", lambda gang, ranks: reserved.append(ranks))
    monkeypatch.setattr(module, "draining_nodes", list)
    monkeypatch.setattr(group, "_room", lambda: 3)
    seen = [(group._ask_of_machines(), list(reserved)) for _ in range(3)]
    assert seen == [(([], 3), []), (([], 3), []), (([], 3), [2])], "one may start later than its head"
