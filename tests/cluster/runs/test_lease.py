"""The lease of a folder: who gets it and when, by each one's own clock, on both kinds of store."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest

from cluster.runs import lease
from cluster.runs.lease import BEAT, LAPSE, LEASE, LOOK, SAY, Held, Holder, Lease, Note
from cluster.runs.state import Superseded
from cluster.storage import StorageError, Store

HERE = Holder.this()
ELSEWHERE = Holder("elsewhere", "another boot", 7, "1")


class Time:
    """A clock that goes on when somebody sleeps, and tells others: `at` runs a function once, when its second has come."""

    def __init__(self, offset: float = 0.0):
        self.now, self._offset, self._due = 0.0, offset, dict[float, Callable[[], None]]()

    def clock(self) -> float:
        return self.now + self._offset

    def at(self, second: float, then: Callable[[], None]) -> None:
        self._due[second] = then

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for second in sorted(second for second in self._due if second <= self.now):
            self._due.pop(second)()


def lease_of(store: Store, time: Time, process: Holder = ELSEWHERE, **given: object) -> Lease:
    return Lease(store, "train", clock=time.clock, sleep=time.sleep, process=process, beating=False, **given)  # type: ignore[arg-type]


def note(store: Store) -> Note:
    return Note.from_json(store.read(LEASE))


def beat_on(holder: Lease, time: Time, until: float) -> None:
    for beat in range(1, int(until / BEAT) + 1):
        time.at(beat * BEAT, holder.beat)


def test_of_many_that_take_it_at_once_exactly_one_gets_it(store: Store) -> None:
    racers = 6
    barrier = Barrier(racers)

    def take(number: int) -> bool:
        one = Lease(store, f"racer {number}", wait=False, clock=Time().clock, process=ELSEWHERE, beating=False)
        barrier.wait()
        return one._taken()

    with ThreadPoolExecutor(racers) as pool:
        assert list(pool.map(take, range(racers))).count(True) == 1


def test_an_orderly_end_lets_the_next_one_in_at_once(store: Store) -> None:
    time = Time()
    with lease_of(store, time) as first:
        first.assert_held()
        assert not note(store).released
    with lease_of(store, time):
        assert time.now == 0 and note(store).beat == 0


def test_it_is_released_when_the_work_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), lease_of(store, Time()):
        raise ZeroDivisionError
    assert note(store).released


def test_who_waits_says_for_whom_and_since_when_and_again_every_minute(store: Store) -> None:
    time, said = Time(), []
    holder = lease_of(store, time)
    holder.take()
    beat_on(holder, time, 150)
    time.at(150.5, holder.release)
    with lease_of(store, time, on_wait=said.append):
        assert 150 < time.now <= 151 + LOOK
    assert len(said) == 3 and SAY == 60
    assert all(f"{store.url} is held by host elsewhere, process 7, since {note(store).since[:10]}" in text for text in said)


def test_who_does_not_wait_is_refused_by_a_living_holder_and_begins_nothing(store: Store) -> None:
    time = Time()
    holder = lease_of(store, time)
    holder.take()
    beat_on(holder, time, 60)
    with pytest.raises(Held, match=rf"{store.url} is held by host elsewhere, process 7, since .* \(train\).*Give the same command again"):
        lease_of(store, time, wait=False).take()
    assert time.now <= BEAT + LOOK and Held.failure == "held"
    holder.assert_held()


@pytest.mark.parametrize("offset", [0.0, 3600.0, -3600.0])
@pytest.mark.parametrize("wait", [True, False])
def test_a_lease_that_stood_still_lapses_after_30_s_of_the_waiter_s_own_clock(store: Store, offset: float, wait: bool) -> None:
    lease_of(store, Time()).take()
    time = Time(offset)
    lease_of(store, time, wait=wait).take()
    assert LAPSE <= time.now <= LAPSE + 2 * LOOK


def test_a_holder_whose_clock_is_an_hour_off_keeps_it(store: Store) -> None:
    time, off = Time(), Time(3600.0)
    holder = lease_of(store, off)
    holder.take()
    beat_on(holder, time, 300)
    time.at(300.5, holder.release)
    lease_of(store, time).take()
    assert time.now > 300


@pytest.mark.starts
def test_a_process_of_this_host_that_is_gone_holds_nothing(store: Store) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    time = Time()
    lease_of(store, time, replace(HERE, pid=int(child.stdout))).take()
    lease_of(store, time, HERE, wait=False).take()
    assert time.now == 0


@pytest.mark.starts
def test_a_process_that_died_and_that_nobody_took_note_of_is_gone(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = replace(HERE, pid=child.pid, started=lease._started(child.pid))
    assert process.started and not process.gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.gone()
    child.communicate()


@pytest.mark.parametrize(
    ("process", "gone"),
    [
        (HERE, False),
        (replace(HERE, started="1"), True),  # its number was given to another process
        (replace(HERE, pid=2**22 + 1), True),
        (replace(HERE, pid=2**22 + 1, boot="another boot"), False),  # this host cannot know
        (replace(HERE, pid=2**22 + 1, boot=""), False),
    ],
)
def test_only_a_process_of_this_boot_is_known_to_be_gone(process: Holder, gone: bool) -> None:
    assert HERE.boot and HERE.started, "this kernel tells"
    assert process.gone() == gone


def test_another_boot_s_process_keeps_it_until_it_stands_still(store: Store) -> None:
    time = Time()
    lease_of(store, time, replace(HERE, pid=2**22 + 1, boot="before the reboot")).take()
    lease_of(store, time, HERE).take()
    assert time.now >= LAPSE


def test_a_frozen_holder_that_wakes_learns_that_it_lost_and_leaves_the_note_alone(store: Store) -> None:
    time = Time()
    frozen, next_one = lease_of(store, time), lease_of(store, time)
    frozen.take()
    next_one.take()
    after = store.read(LEASE)
    with pytest.raises(Superseded, match=f"{store.url}/{LEASE} was taken by another process"):
        frozen.assert_held()
    frozen.beat()
    frozen.release()
    assert frozen.lost.is_set() and store.read(LEASE) == after
    next_one.beat()
    next_one.assert_held()


def test_a_holder_looks_into_the_store_only_if_its_heart_stood_still(store: Store) -> None:
    time = Time()
    holder, thief = lease_of(store, time), lease_of(store, Time())
    holder.take()
    time.sleep(LAPSE - 1)
    before = store.read(LEASE)
    holder.assert_held()
    assert store.read(LEASE) == before
    time.sleep(1)
    holder.assert_held()
    assert note(store).beat == 1
    assert thief._taken(store.get(LEASE)[1])
    holder.assert_held()  # what it writes in these seconds, the numbers of its life fence
    time.sleep(LAPSE)
    with pytest.raises(Superseded):
        holder.assert_held()


def test_a_note_that_somebody_deleted_is_lost(store: Store) -> None:
    holder = lease_of(store, Time())
    holder.take()
    store.delete(LEASE)
    holder.beat()
    assert holder.lost.is_set() and not store.exists(LEASE)


class Away:
    """A store that cannot be reached for a while, or answers nothing of what it did."""

    def __init__(self, store: Store):
        self._store, self.away, self.silent = store, False, False

    def __getattr__(self, name: str) -> object:
        if self.away and name in ("get", "replace", "create"):
            raise StorageError(f"{self._store.url}: no answer")
        if self.silent and name == "replace":
            return self._unanswered
        return getattr(self._store, name)

    def _unanswered(self, *given: object) -> str:
        self._store.replace(*given)  # type: ignore[arg-type]
        raise StorageError(f"{self._store.url}: the answer was lost")


def test_an_outage_of_the_store_takes_no_lease_from_its_holder(store: Store) -> None:
    """The holder cannot beat while the store is away, and the waiter cannot see that it would."""
    time, holder_side, waiter_side = Time(), Away(store), Away(store)
    holder = lease_of(holder_side, time)  # type: ignore[arg-type]
    holder.take()
    beat_on(holder, time, 4 * BEAT)

    def outage() -> None:  # one look of the waiter lasts as long as the outage does, because its request is retried
        waiter_side.away = True

    def get(key: str) -> tuple[bytes, str]:
        if waiter_side.away:
            time.now += 120
            waiter_side.away = False
            beat_on_after()
        return store.get(key)

    def beat_on_after() -> None:
        for beat in range(20):
            time.at(time.now + 8 + BEAT * beat, holder.beat)
        time.at(time.now + 100, holder.release)

    waiter_side.get = get  # type: ignore[attr-defined]
    time.at(4 * BEAT + 1, outage)
    lease_of(waiter_side, time).take()  # type: ignore[arg-type]
    assert not holder.lost.is_set() and time.now > 220


def test_a_heartbeat_that_fails_is_no_loss_and_one_whose_answer_was_lost_is_recognised(store: Store) -> None:
    time, flaky = Time(), Away(store)
    holder = lease_of(flaky, time)  # type: ignore[arg-type]
    holder.take()
    flaky.away = True
    for _ in range(6):
        with pytest.raises(StorageError):
            holder.beat()
    time.sleep(LAPSE)
    with pytest.raises(StorageError):
        holder.assert_held()
    flaky.away, flaky.silent = False, True
    with pytest.raises(StorageError, match="the answer was lost"):
        holder.beat()
    flaky.silent = False
    holder.assert_held()
    assert not holder.lost.is_set() and note(store).beat >= 8
    flaky.away = True
    holder.release()  # says so, and the lease lapses by itself


def test_a_note_that_this_program_cannot_read_is_a_holder_s_all_the_same(store: Store) -> None:
    for data in (b"{half", b'{"process": {"host": "there", "rack": 3}, "version": 9}', b"[]"):
        store.put(LEASE, data)
        time = Time()
        lease_of(store, time).take()
        assert time.now >= LAPSE


def test_a_thread_keeps_it_fresh_and_ends_with_the_block(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with Lease(store, "train") as held:
        while note(store).beat < 3:
            pass
        held.assert_held()
    after = json.loads(store.read(LEASE))
    assert after["released"] and not held._beating.is_alive()  # type: ignore[union-attr]
