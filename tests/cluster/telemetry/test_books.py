"""The books of a life: every millisecond of every worker in exactly one state, and what a fault cost on its account."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.telemetry.accounts import GroupBooks, PlaceBooks, TaskBooks
from cluster.telemetry.books import NOWHERE, SPANS, Berth, Books, HeldPlace, even
from cluster.telemetry.books_log import ENDED, EVERY, inherit
from cluster.telemetry.meter import Meter
from cluster.telemetry.receipt import receipt
from tests.cluster.telemetry.test_meter import Clock

STAGE, HERE = "diffusion", Berth("host", 3.6, 0.5)


class Ranks:
    """A group whose ranks train in turn on one clock, and tell the books."""

    def __init__(self, ranks: int = 2, life: int = 1):
        self.clock = Clock(1000.0)
        self.books = Books(life, self.clock)
        self.ranks, self.progress = ranks, 0.0
        self.start(0.0)

    def start(self, progress: float, fault: str = "") -> None:
        self.group, self.progress = GroupBooks(self.books, STAGE, [HERE] * self.ranks, progress, fault), progress
        self.renew()

    def renew(self) -> None:
        self.meters = [Meter(rank, self.ranks, STAGE, self.clock) for rank in range(self.ranks)]
        for meter in self.meters:
            meter.gauges["progress_items"] = self.progress

    def tell(self) -> None:
        for meter in self.meters:
            self.group.hear(meter.snapshot())

    def load(self, seconds: float) -> None:
        self.clock.now += seconds
        for meter in self.meters:
            meter.begin()

    def step(self, seconds: float = 1.0, items: float = 10.0, phase: str = "forward", done: bool = True) -> None:
        phases = [meter.phase(phase) for meter in self.meters]
        for one in phases:
            one.__enter__()
        self.clock.now += seconds
        for one in phases:
            one.__exit__(None, None, None)
        if done:
            self.progress += items
            for meter in self.meters:
                meter.step_done(items=1)
                meter.gauges["progress_items"] = self.progress
        self.tell()

    def seconds(self, record: dict[str, Any] | None = None) -> dict[str, float]:
        """By state; `state fault` where a fault is to blame."""
        sums: Counter[str] = Counter()
        for _, state, fault, _, ms in rows(record or self.books.record()):
            sums[f"{state} {fault}".strip()] += ms
        return {state: ms / 1000 for state, ms in sums.items()}


def rows(record: dict[str, Any]) -> list[Any]:
    """What is booked, and what is not yet."""
    return [*record["lines"], *record["pending"]]


def test_a_healthy_group_starts_trains_and_gives_back() -> None:
    ranks = Ranks()
    ranks.load(12)
    for _ in range(5):
        ranks.step(1, phase="data_wait", done=False)
        ranks.step(2)
    ranks.step(3, phase="checkpoint", done=False)
    ranks.clock.now += 4  # Ray ends them
    ranks.group.close()
    assert ranks.seconds() == {"starting": 24, "data_wait": 10, "compute": 20, "checkpoint": 6, "idle": 8}
    assert sum(ranks.seconds().values()) == 2 * (ranks.clock.now - 1000)


def test_a_fault_owns_what_was_not_followed_by_a_step_the_new_start_and_what_is_done_again() -> None:
    ranks = Ranks()
    ranks.load(10)
    for _ in range(4):
        ranks.step(1)  # to 40 items
    ranks.step(7, done=False)  # hangs
    ranks.clock.now += 3  # until it is noticed
    fault = ranks.books.fault("hang", STAGE, "rank 1 hangs")
    ranks.group.lose(fault, progress=20)
    ranks.progress = 20
    ranks.clock.now += 5
    ranks.renew()
    ranks.load(6)
    for _ in range(4):
        ranks.step(1)  # 20 to 60: the first two again
    ranks.group.close()
    assert ranks.seconds() == {"starting": 20, "compute": 8 + 4, f"recovery {fault}": 2 * (7 + 3 + 5 + 6), f"replay {fault}": 4}
    assert ranks.books.furthest == {STAGE: 60}
    assert ranks.books.record()["faults"] == [
        {
            **{"fault": "1.1", "class": "hang", "stage": STAGE, "text": "rank 1 hangs", "time": 1024000, "life": 1, "progress": 40},
            "restarts": False,
        }
    ]


def test_ranks_that_fail_lose_what_no_step_followed_and_those_that_leave_do_not() -> None:
    for failed, lost in ((True, 5 + 3), (False, 3)):
        ranks = Ranks(1)
        ranks.load(2)
        ranks.step(1)
        ranks.step(5, done=False)
        ranks.clock.now += 3
        fault = ranks.books.fault("preempted", STAGE, "the machine goes")
        ranks.group.close(fault, failed)
        assert ranks.seconds()[f"recovery {fault}"] == lost and ranks.seconds()["compute"] == 9 - lost


def test_a_report_that_spans_the_end_of_the_replay_is_divided_by_items() -> None:
    ranks = Ranks(1)
    ranks.group.close()
    ranks.books.reach(STAGE, 15.0)
    ranks.books.owe(STAGE, fault := ranks.books.fault("driver", STAGE, "killed", life=1))
    ranks.start(0.0, fault)
    ranks.load(0)
    ranks.step(8, items=20)
    ranks.group.close()
    assert ranks.seconds() == {"replay 1.1": 6, "compute": 2}


def test_ranks_that_leave_at_a_checkpoint_lose_no_step_and_the_next_start_is_on_the_account_of_why() -> None:
    ranks = Ranks(1)
    ranks.load(2)
    ranks.step(5)
    ranks.clock.now += 1
    notice = ranks.books.fault("preempted", STAGE, "the machine will be taken away")
    ranks.group.close(notice)
    wait = PlaceBooks(ranks.books, STAGE, [NOWHERE], "waiting", notice)
    ranks.clock.now += 30
    assert ranks.seconds()[f"waiting {notice}"] == 30, "what waits is seen while it waits"
    wait.close()
    ranks.start(10.0, notice)
    ranks.load(3)
    ranks.step(5)
    ranks.group.close()
    assert ranks.seconds() == {"starting": 2, "compute": 10, f"recovery {notice}": 4, f"waiting {notice}": 30}


def test_what_is_not_booked_yet_is_in_the_record_and_not_in_the_counters() -> None:
    ranks = Ranks(1)
    ranks.load(2)
    ranks.step(5, done=False)
    ranks.clock.now += 1
    assert ranks.seconds() == {"starting": 2, "compute": 6}
    assert ranks.books.states() == {}
    assert ranks.books.record()["held"] == [[STAGE, 0]]
    ranks.step(1)
    assert ranks.books.states() == {(STAGE, "starting"): 2, (STAGE, "compute"): 7}


def test_the_rank_that_the_others_wait_for_is_named_with_what_it_costs_them() -> None:
    ranks = Ranks(3)
    ranks.load(1)
    for rank, wait in ((0, 5), (1, 0.5), (2, 4)):
        with ranks.meters[rank].phase("agree"):
            ranks.clock.now += wait
        ranks.meters[rank].step_done(items=1)
    ranks.tell()
    assert ranks.books.record()["slowest"], "told while they train"
    ranks.group.close()
    assert ranks.books.record()["slowest"] == [{"stage": STAGE, "rank": 1, "node": "host", "seconds": 8.0, "ranks": 3}]


def test_late_and_foreign_reports_change_nothing() -> None:
    ranks = Ranks(2)
    ranks.load(1)
    early = ranks.meters[0].snapshot()
    ranks.step(1)
    ranks.group.hear(early)
    ranks.group.hear(Meter(0, 2, STAGE, ranks.clock).snapshot())
    ranks.group.hear(Meter(7, 8, STAGE, ranks.clock).snapshot())
    ranks.step(4, phase="data_wait")
    ranks.group.close()
    assert ranks.seconds() == {"starting": 2, "compute": 2, "data_wait": 8}


MOVES = st.lists(
    st.tuples(st.sampled_from(["step", "half", "silent", "lose", "leave", "fail", "load"]), st.integers(0, 50_000), st.integers(0, 30)),
    max_size=30,
)


@given(MOVES, st.integers(1, 3))
def test_all_states_sum_exactly_to_the_milliseconds_that_workers_were_held_whatever_happens(
    moves: list[tuple[str, int, int]], count: int
) -> None:
    ranks = Ranks(count)
    for what, ms, items in moves:
        seconds = ms / 1000
        match what:
            case "step" | "half":
                ranks.step(seconds, items, done=what == "step")
            case "silent":
                ranks.clock.now += seconds
            case "load":
                ranks.load(seconds)
            case "lose":
                ranks.clock.now += seconds
                ranks.progress = max(0.0, ranks.progress - items)
                ranks.group.lose(ranks.books.fault("lost", STAGE, "gone"), ranks.progress)
                ranks.renew()
            case "leave" | "fail":
                fault = ranks.books.fault("preempted", STAGE, "going")
                ranks.group.close(fault, failed=what == "fail")
                ranks.start(ranks.progress, fault)
        record = ranks.books.record()
        held = count * (ranks.books.now() - 1_000_000)
        assert sum(ms for *_, ms in rows(record)) == held
        assert all((state in ("recovery", "replay")) <= bool(fault) for _, state, fault, *_ in rows(record))
    ranks.group.close()
    booked = round(1000 * sum(ranks.books.states().values()))
    assert booked == held if moves else booked == 0
    record = ranks.books.record()
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(ranks.books.record()))
    drawn = sum(sum(span.values()) for span in record["timeline"]["spans"])
    assert drawn == pytest.approx(booked / 1000, abs=1e-3)


@given(st.integers(0, 10**12), st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e9), min_size=1))
def test_a_whole_is_divided_without_a_rest(total: int, weights: dict[str, float]) -> None:
    if sum(weights.values()) > 0:
        parts = even(total, weights)
        assert sum(parts.values()) == total and all(part > 0 for part in parts.values())


def test_the_timeline_of_a_long_life_stays_small() -> None:
    clock = Clock(0.0)
    books = Books(1, clock)
    for hour in range(100):
        clock.now += 3600
        books.book(STAGE, {"compute" if hour % 2 else "data_wait": 3_600_000}, books.now(), HERE)
    timeline = books.record()["timeline"]
    assert len(timeline["spans"]) <= SPANS and timeline["span"] * len(timeline["spans"]) >= 360_000_000
    assert sum(sum(span.values()) for span in timeline["spans"]) == pytest.approx(360_000)


def test_a_second_of_recovery_without_a_fault_is_a_mistake_of_the_program() -> None:
    books = Books(1, Clock(0.0))
    with pytest.raises(AssertionError, match="recovery of no fault"):
        books.book(STAGE, {"recovery": 1}, 0, HERE)


def test_tasks_book_what_they_say_themselves_and_a_failed_one_is_lost_to_its_fault() -> None:
    clock = Clock(0.0)
    books = Books(1, clock)
    tasks = TaskBooks(books, "latents", "encode", lambda address: Berth(address, 1.0, 0.5))
    for call in range(3):
        tasks.begin(call)
    clock.now = 10.0
    assert sum(ms for *_, ms in rows(books.record())) == 30_000, "what works is seen while it works"
    tasks.end(0, "h1", starting=3.0, working=5.0)  # 2 s in the queue of others
    tasks.lose(1, "storage", "no answer", "h2")
    tasks.begin(3)
    clock.now = 14.0
    tasks.end(2)
    found = books.record()
    sums: Counter[tuple[str, str, str]] = Counter()
    for _, state, fault, berth, ms in rows(found):
        sums[state, fault, found["berths"][berth]["node"]] += ms
    assert sums == {
        ("starting", "", "h1"): 3000,
        ("encode", "", "h1"): 5000 + 4000 + 14_000,  # where nobody says where, where the last one was
        ("recovery", "1.1", "h2"): 10_000,
    }


def test_work_that_is_done_again_is_on_the_account_of_the_fault_that_it_was_lost_to() -> None:
    ranks = Ranks(1)
    for _ in range(10):
        ranks.step()  # to 100
    first = ranks.books.fault("lost", STAGE, "gone")
    ranks.group.lose(first, progress=60)
    ranks.progress = 60
    ranks.renew()
    ranks.step()  # to 70, where it leaves for more room
    more = ranks.books.fault("resized", STAGE, "there is room")
    ranks.group.close(more)
    ranks.start(70, more)
    ranks.step()  # to 80
    again = ranks.books.fault("lost", STAGE, "gone again")
    ranks.group.close(again, failed=True)
    ranks.start(70, again)
    for _ in range(5):
        ranks.step()  # to 120: 10 items again for the second, 20 more for the first
    ranks.group.close()
    replayed = {state: seconds for state, seconds in ranks.seconds().items() if state.startswith("replay")}
    assert replayed == {f"replay {first}": 2 + 2, f"replay {again}": 1}
    record = json.loads(json.dumps(ranks.books.record()))
    later = Books(2, ranks.clock)
    inherit(later, [{**record, ENDED: "STOPPED"}])
    assert later.owing(STAGE, 75) == (80, again) and later.owing(STAGE, 90) == (100, first) and later.owing(STAGE, 100) == (0, "")


def test_what_a_killed_driver_had_not_booked_is_lost_with_it() -> None:
    ranks = Ranks(1)
    ranks.load(100)
    ranks.step(1)
    ranks.step(30, done=False)
    last = ranks.books.record(stage=STAGE)
    later = Books(2, ranks.clock)
    inherit(later, [last])
    assert receipt([last])["states"]["compute"] == 31, "until somebody knows better"
    made = receipt([last, later.record()])
    assert made["states"]["compute"] == 1 and made["faults"][0]["recovery"] == 30 + EVERY


def test_what_an_earlier_life_held_is_not_drawn_into_this_one() -> None:
    clock = Clock(1000.0)
    books = Books(2, clock)
    books.book(STAGE, {"recovery": 30_000}, books.now(), HERE, books.fault("driver", STAGE, "killed", life=1))
    assert books.record()["timeline"]["spans"] == [] and sum(books.states().values()) == 30


def test_places_that_ray_held_from_then_to_then_are_booked_from_then_to_then() -> None:
    clock = Clock(100.0)
    books = Books(1, clock)
    group = GroupBooks(books, STAGE, [HERE], 0.0, since=97.5)
    clock.now = 110.0
    group.close(until=108.25)
    assert books.states() == {(STAGE, "idle"): 10.75}


def test_a_record_that_is_made_while_a_place_is_taken_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books(1)
    HeldPlace(books, "diffusion", Berth("first"), "starting")
    plain = Berth._asdict

    def another_comes(berth: Berth) -> dict[str, object]:
        HeldPlace(books, "diffusion", Berth("second"), "starting")
        return plain(berth)

    monkeypatch.setattr(Berth, "_asdict", another_comes)
    found = books.record()
    assert [berth["node"] for berth in found["berths"]] == ["first"] and found["held"] == [["diffusion", 0]]
