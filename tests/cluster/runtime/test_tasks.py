"""What tasks share is made once in a process, whatever the number of calls."""

import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import ray

from cluster.config.schema import Workers
from cluster.runtime import tasks
from cluster.runtime.nodes import nodes
from cluster.runtime.ray_cluster import Resources
from cluster.runtime.stuck import alive
from cluster.runtime.tasks import TaskLost, map_tasks
from cluster.storage import StorageError

CALLS = 40


class Shared:
    """Counts how often it was unpickled in this process, and keeps what it makes."""

    unpickled = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        Shared.unpickled += 1

    @cached_property
    def made(self) -> list[int]:
        return []


def note(shared: Shared, number: int) -> tuple[int, int, int]:
    """This process, how often it unpickled what is shared, and the calls it answered with it."""
    shared.made.append(number)
    return os.getpid(), Shared.unpickled, len(shared.made)


@pytest.mark.usefixtures("local_ray")
def test_a_process_takes_what_is_shared_once_and_anew_for_the_next_piece_of_work() -> None:
    for times in (1, 2):
        results = dict(map_tasks(note, [(number,) for number in range(CALLS)], Workers(), Shared()))
        assert sorted(results) == list(range(CALLS))
        processes = Counter(process for process, _, _ in results.values())
        for process, calls in processes.items():
            mine = [(unpickled, answered) for other, unpickled, answered in results.values() if other == process]
            assert max(answered for _, answered in mine) == calls and len({unpickled for unpickled, _ in mine}) == 1
            assert mine[0][0] <= times
        assert max(processes.values()) > 1, "some process answered more than one call"


def refuse(shared: str, number: int) -> None:
    raise KeyError(shared, number)


@pytest.mark.usefixtures("local_ray")
def test_the_head_is_not_asked_for_each_answer_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tasks, "nodes", lambda original=tasks.nodes: asked.append(1) or original())
    begun = time.monotonic()
    assert len(list(map_tasks(note, [(number,) for number in range(CALLS)], Workers(), Shared()))) == CALLS
    assert len(asked) <= 1 + (time.monotonic() - begun) / tasks.ASKED_EVERY


@pytest.mark.usefixtures("local_ray")
def test_the_error_of_a_call_is_raised_as_it_was() -> None:
    with pytest.raises(KeyError, match="why") as raised:
        list(map_tasks(refuse, [(0,)], Workers(), "why"))
    here = ray.util.get_node_ip_address()
    assert re.fullmatch(rf"host {re.escape(here)}, process \d+", tasks.raised_in(raised.value))


def lose_once(folder: str, number: int) -> int:
    """Ends its process at the first call of each number, so hard that nobody can say why."""
    try:
        open(f"{folder}/{number}", "x").close()
    except FileExistsError:
        return number
    os._exit(1)


@pytest.mark.usefixtures("local_ray")
def test_a_call_whose_process_goes_away_is_made_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RAY_RETRIES", 0)
    assert sorted(map_tasks(lose_once, [(1,), (2,)], Workers(), str(tmp_path))) == [(0, 1), (1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def stuck_once(folder: str) -> int:
    """Waits for ever when it is called first."""
    try:
        open(f"{folder}/stuck", "x").close()
    except FileExistsError:
        return 7
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return 0


def slow_but_alive(_: str) -> int:
    for _ in range(8):
        time.sleep(0.5)
        alive()
    return os.getpid()


@pytest.mark.usefixtures("local_ray")
def test_a_call_that_never_ends_is_made_again_and_one_that_gets_on_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "RAY_RETRIES", 0)
    monkeypatch.setattr(tasks, "STUCK", 2.0)
    assert list(map_tasks(stuck_once, [()], Workers(), str(tmp_path))) == [(0, 7)]
    assert (tmp_path / "stuck").exists() and "of stuck_once(), which is tried again" in caplog.text
    caplog.clear()
    list(map_tasks(slow_but_alive, [()], Workers(), ""))
    assert "tried again" not in caplog.text


def no_store(shared: str, number: int) -> None:
    with open(f"{shared}/tries", "a") as tries:
        tries.write("x")
    raise StorageError("nobody answers")


@pytest.mark.usefixtures("local_ray")
def test_a_store_that_does_not_answer_is_asked_again_by_tasks_too_and_given_up(tmp_path) -> None:
    with pytest.raises(StorageError, match="nobody answers"):
        list(map_tasks(no_store, [(0,)], Workers(), str(tmp_path)))
    assert (tmp_path / "tries").read_text() == "x" * (1 + tasks.RETRIES)


def sleep_until(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.1)


@pytest.mark.usefixtures("local_ray")
def test_a_call_without_room_or_end_is_said_with_the_room_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "SAID_EVERY", 0.5)
    results = map_tasks(sleep_until, [()], Workers(), str(tmp_path / "go"))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(list, results)
        while not (said := [record.getMessage() for record in caplog.records]):
            time.sleep(0.1)
        (tmp_path / "go").touch()
        assert done.result() == [(0, None)]
    assert re.fullmatch(r"sleep_until: no result for 0.5 s; a call needs 1 CPU, and \d+ of \d+ are free", said[0])


def stay(folder: str, number: int) -> None:
    Path(folder, f"begun-{number}").touch()
    sleep_until(f"{folder}/go")


def test_a_cluster_that_grows_is_used_while_calls_are_under_way(
    local_ray: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_ray.cpus >= 4
    known = [[replace(node, total={"CPU": 1.0}) for node in nodes()]]
    monkeypatch.setattr(tasks, "nodes", lambda: known[0])
    monkeypatch.setattr(tasks, "SAID_EVERY", 0.5)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(list, map_tasks(stay, [(number,) for number in range(8)], Workers(), str(tmp_path)))
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.1)
        time.sleep(1)
        assert len(list(tmp_path.glob("begun-*"))) == 2, "as many as there are places, and as many again for an autoscaler to see"
        known[0] = nodes()
        while len(list(tmp_path.glob("begun-*"))) < 4:
            time.sleep(0.1)
        (tmp_path / "go").touch()
        assert len(done.result()) == 8


class Begun:
    """An account that keeps which calls it holds, and how many seconds those worked that were answered."""

    def __init__(self) -> None:
        self.held, self.worked = set[int](), list[float]()

    def begin(self, call: int) -> None:
        self.held.add(call)

    def end(self, call: int, address: str = "", starting: float = 0.0, working: float = 0.0) -> None:
        self.held.remove(call)
        self.worked += [working] if address else []

    def lose(self, call: int, kind: str, text: str, address: str = "") -> None:
        self.held.remove(call)


@ray.remote(num_cpus=3)
def work_of_another(path: str) -> None:
    sleep_until(path)


def test_calls_that_wait_for_places_of_another_job_are_not_booked_as_work(
    local_ray: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "SAID_EVERY", 0.2)
    (tmp_path / "other").mkdir()
    other, account = work_of_another.remote(f"{tmp_path}/other/go"), Begun()
    places = int(local_ray.cpus) - 3
    while int(sum(node.free.get("CPU", 0.0) for node in nodes())) != places:
        time.sleep(0.1)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(list, map_tasks(stay, [(number,) for number in range(8)], Workers(), str(tmp_path), account))
        while len(list(tmp_path.glob("begun-*"))) < places:
            time.sleep(0.1)
        time.sleep(2 * tasks.ASKED_EVERY)
        assert len(account.held) == len(list(tmp_path.glob("begun-*"))) == places
        (tmp_path / "other/go").touch()
        ray.get(other)
        (tmp_path / "go").touch()
        assert len(done.result()) == 8
    assert not account.held and len(account.worked) == 8


def lose_the_first(folder: str, number: int) -> int:
    """Call 0 ends its process, always; others come to their end meanwhile."""
    if number:
        return number
    with open(f"{folder}/tries", "a") as tries:
        tries.write("x")
    os._exit(1)


@pytest.mark.usefixtures("local_ray")
def test_a_call_that_always_fails_is_given_up_and_named_however_many_others_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "RAY_RETRIES", 0)
    found = []
    with pytest.raises(TaskLost, match=r"^lose_the_first\(0\): "):
        for number, _ in map_tasks(lose_the_first, [(number,) for number in range(400)], Workers(), str(tmp_path)):
            found.append(number)
    assert (tmp_path / "tries").read_text() == "x" * tasks.CALL_TRIES and found


def move(_: None, number: int) -> int:
    """The next call of this process is for another GPU."""
    ray.get_gpu_ids = lambda: [number]
    return os.getpid()


@pytest.mark.usefixtures("local_ray")
def test_a_process_answers_no_call_that_is_for_another_gpu_than_its_first() -> None:
    answered = [process for number in range(3) for _, process in map_tasks(move, [(number,)], Workers())]
    assert len(set(answered)) == 3


class StuckImport:
    """What stops when it is unpickled first, as an import may."""

    def __init__(self, folder: str):
        self.folder = folder

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__ |= state
        stuck_once(self.folder)

    def __call__(self, _: str) -> int:
        return 8

    __name__ = "stuck_import"


@pytest.mark.usefixtures("local_ray")
def test_a_process_that_gets_stuck_before_its_call_begins_is_made_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RAY_RETRIES", 0)
    monkeypatch.setattr(tasks, "STUCK", 2.0)
    assert list(map_tasks(StuckImport(str(tmp_path)), [()], Workers(), "")) == [(0, 8)]
    assert (tmp_path / "stuck").exists()
