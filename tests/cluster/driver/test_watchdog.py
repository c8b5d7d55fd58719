"""Which ranks hang, told by a clock of the test's own: named in time, and never one that is only slow."""

from collections.abc import Mapping, Sequence

import pytest

from cluster.driver.watchdog import LEAST, START, Watchdog
from cluster.telemetry.meter import ENDED, Meter


class Group:
    """Ranks that report each second, and a clock."""

    def __init__(self, ranks: int):
        self.now, self.elapsed = 0.0, 0.0
        self.watchdog = Watchdog(ranks, lambda rank: f"rank {rank}", lambda: self.now)

    def second(self, where: Mapping[int, tuple[int, str]], slowest: float = 0.2, waiting: Sequence[int] = ()) -> str:
        """A second goes by, then these ranks say in which step and phase they are; what is found, as `[ranks] text`."""
        self.now += 1
        for rank, (steps, phase) in where.items():
            snapshot = {"rank": rank, "elapsed": self.now, "steps": steps, "phase": phase, "phase_seconds": 0.5, "slowest_step": slowest}
            self.watchdog.hear(snapshot | {"collective": rank in waiting})  # type: ignore[arg-type]
        stuck = self.watchdog.look()
        return f"{list(stuck.ranks)} {stuck.text}" if stuck else ""

    def seconds(self, count: int, where: Mapping[int, tuple[int, str]], slowest: float = 0.2, waiting: Sequence[int] = ()) -> list[str]:
        return [found for _ in range(count) if (found := self.second(where, slowest, waiting))]


def trained(ranks: int = 3) -> Group:
    group = Group(ranks)
    for step in range(1, 4):
        assert not group.second({rank: (step, "forward") for rank in range(ranks)})
    return group


def test_a_rank_that_falls_silent_is_named_after_the_limit_and_not_before() -> None:
    group = trained()
    others = {0: (4, "agree"), 2: (4, "agree")}
    assert group.seconds(int(LEAST), others) == []
    found = group.second(others)
    assert found.startswith("[1] no sign of life for more than 10 s: rank 1 in phase forward of its step 3")


def test_a_rank_that_does_not_come_to_where_the_others_wait_is_named() -> None:
    group = trained()
    where = {0: (4, "agree"), 1: (4, "forward"), 2: (4, "agree")}
    found = group.seconds(12, where)
    assert len(found) == 1 and found[0].startswith("[1] no step for 11 s") and "rank 1 in phase forward of its step 4" in found[0]


def test_a_rank_that_left_out_a_collective_is_named_and_not_the_one_that_waits_for_it() -> None:
    group = trained()
    found = group.seconds(12, {0: (4, "agree"), 1: (5, "backward"), 2: (4, "agree")})
    assert found[0].startswith("[1] ") and "rank 1 in phase backward" in found[0]


def test_where_all_wait_for_each_other_all_are_named() -> None:
    found = trained().seconds(12, {rank: (4, "backward") for rank in range(3)})
    assert found[0].startswith("[0, 1, 2] ") and "all 3 ranks are there" in found[0]
    found = trained().seconds(12, {rank: (4, "backward") for rank in range(3)}, waiting=range(3))
    assert found[0].startswith("[0, 1, 2] ") and "all 3 ranks are there" in found[0]


def test_a_rank_for_which_the_others_wait_in_the_same_phase_is_named_alone() -> None:
    found = trained().seconds(12, {rank: (4, "backward") for rank in range(3)}, waiting=(0, 2))
    assert found[0].startswith("[1] ") and "the others wait for it: rank 1 in phase backward" in found[0]


@pytest.mark.parametrize(("slowest", "limit"), [(0.2, 10), (4.0, 20)])
def test_the_limit_is_ten_seconds_or_five_times_the_slowest_step(slowest: float, limit: int) -> None:
    group = trained()
    where = {rank: (4, "backward") for rank in range(3)}
    group.second(where, slowest)
    assert group.seconds(limit, where, slowest) == []
    assert group.second(where, slowest)


def test_a_group_whose_steps_go_on_is_left_alone_however_slow() -> None:
    group = trained()
    for step in range(4, 40):
        assert group.seconds(9, {rank: (step, "forward") for rank in range(3)}, slowest=9.0) == []


@pytest.mark.parametrize("phase", ["data_wait", "checkpoint", "evaluation"])
def test_waiting_for_the_store_and_validation_have_limits_of_their_own_and_are_said(phase: str) -> None:
    group = trained()
    where = {0: (4, "agree"), 1: (4, phase), 2: (4, "agree")}
    assert group.seconds(100, where) == []
    assert group.watchdog.slow().startswith("no step for 99 s: rank")
    assert group.watchdog.slow() == "", "said once a minute"
    assert group.seconds(4000, where), "and they end"


def test_steps_of_a_minute_are_no_hang_from_the_first_on_and_what_is_beside_them_does_not_make_the_limit_longer() -> None:
    now, found = [0.0], []
    watchdog, meter = Watchdog(1, lambda rank: f"rank {rank}", lambda: now[0]), Meter(0, 1, "diffusion", lambda: now[0])

    def spend(seconds: int) -> None:
        for _ in range(seconds):
            now[0] += 1
            watchdog.hear(meter.snapshot())
            found.append(watchdog.look())

    spend(100)
    meter.begin()
    for step in range(4):
        with meter.phase("backward"):
            spend(60)
        with meter.phase("evaluation" if step == 2 else "data_wait"):
            spend(200)
        meter.step_done(items=1)
    assert not any(found)
    with meter.phase("backward"):
        spend(300)
        assert not any(found)
        spend(2)
    assert found[-1] and found[-1].text.startswith("no step for 301 s, limit 300 s")


@pytest.mark.parametrize("second", [1, 299])
def test_a_first_step_that_compiles_is_the_measure_of_the_second_one_alone(second: int) -> None:
    now, found = [0.0], []
    watchdog, meter = Watchdog(1, lambda rank: f"rank {rank}", lambda: now[0]), Meter(0, 1, "diffusion", lambda: now[0])

    def spend(seconds: int) -> None:
        for _ in range(seconds):
            now[0] += 1
            watchdog.hear(meter.snapshot())
            if stuck := watchdog.look():
                found.append(stuck.text)

    meter.begin()
    for seconds in (300, second, *[1] * 10):
        with meter.phase("forward"):
            spend(seconds)
        meter.step_done(items=1)
    limit = max(int(LEAST), 5 * second)
    spend(limit)
    assert found == []
    spend(2)
    assert found and found[0].startswith(f"no step for {limit + 1} s, limit {limit} s")


def test_a_rank_that_has_ended_may_be_silent_while_others_finish_a_checkpoint_and_not_for_ever() -> None:
    group = trained()
    group.second({rank: (4, ENDED) for rank in (1, 2)})
    assert group.seconds(1700, {0: (4, "checkpoint")}) == []
    assert group.seconds(200, {0: (4, "checkpoint")})[0].startswith("[0] no step for 1801 s")


def test_a_step_that_waited_for_the_store_has_its_time_afterwards() -> None:
    group = trained()
    waiting = {0: (4, "agree"), 1: (4, "data_wait"), 2: (4, "agree")}
    assert group.seconds(200, waiting) == []
    after = {0: (4, "agree"), 1: (4, "forward"), 2: (4, "agree")}
    assert group.seconds(11, after) == []
    assert group.second(after).startswith("[1] no step for 11 s")


def test_what_starts_may_take_its_time_and_it_is_said() -> None:
    group = Group(2)
    starting = {0: (0, "startup")}
    assert group.seconds(11, starting) == []
    assert group.watchdog.slow() == "the ranks are starting, 11 s so far"
    assert group.seconds(int(START) - 12, starting) == []
    assert "did not start" in group.seconds(3, starting)[0]


def test_a_start_that_looks_at_val_first_has_the_limit_of_such_looks() -> None:
    group = Group(1)
    looking = {0: (0, "evaluation")}
    assert group.seconds(3600, looking) == []
    assert "did not start within 3600 s" in group.seconds(2, looking)[0]


def test_a_driver_that_was_frozen_does_not_take_its_ranks_for_silent() -> None:
    group = trained()
    group.now += 300
    assert group.watchdog.look() is None
    group.now += 1
    assert group.watchdog.look() is None
