"""The meter: every second in one state, every step in one bucket of each phase it spent time in. The tally: no sum ever falls."""

import json
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.telemetry.meter import BUCKETS, PHASES, STATES, Meter, Tally


class Clock:
    """Time that passes when told; `clock.now += seconds`."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


PLACES = st.sampled_from([*PHASES, "outside", "step"])
MOVES = st.lists(st.tuples(PLACES, st.integers(0, 4096), st.sampled_from([None, *PHASES])), max_size=30)


@given(MOVES)
def test_every_second_falls_in_exactly_one_state(moves):
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    for name, ticks, inner in moves:
        seconds = ticks / 1024  # dyadic, so sums are exact
        if name == "step":
            meter.step_done(items=1)
        elif name == "outside":
            clock.now += seconds
        else:
            with meter.phase(name):
                clock.now += seconds
                if inner is not None:
                    with meter.phase(inner):
                        clock.now += seconds
        snapshot = meter.snapshot()
        assert tuple(snapshot["totals"]["states"]) == STATES
        assert sum(snapshot["totals"]["states"].values()) == snapshot["elapsed"] == clock.now - 1000.0


def test_starting_lasts_until_the_rank_begins_and_what_lies_between_phases_is_computing():
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    clock.now += 10
    with meter.phase("evaluation"):  # a checkpoint whose look at val an earlier life owed
        clock.now += 32
    clock.now += 2
    meter.begin()
    for phase, seconds in (("data_wait", 1), ("forward", 2), ("backward", 4), ("optimizer", 8), ("checkpoint", 16)):
        with meter.phase(phase):
            clock.now += seconds
        clock.now += 0.5
    states = meter.snapshot()["totals"]["states"]
    assert states == {"starting": 12, "data_wait": 1, "compute": 14 + 2.5, "checkpoint": 16, "evaluate": 32}


def test_a_phase_within_a_phase_takes_its_seconds_from_the_outer_one():
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    with meter.phase("forward"):
        clock.now += 1
        with meter.phase("data_wait"):
            clock.now += 2
        clock.now += 4
    states = meter.snapshot()["totals"]["states"]
    assert (states["compute"], states["data_wait"]) == (5, 2)


def test_a_phase_that_raises_is_left():
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    with pytest.raises(KeyError), meter.phase("forward"):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert meter.snapshot()["totals"]["states"]["starting"] == 2


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0005, 0), (0.001, 0), (0.0015, 1), (1.0, BUCKETS.index(1.0)), (999.0, len(BUCKETS))])
def test_a_step_counts_in_the_first_bucket_that_holds_it(seconds, bucket):
    clock = Clock(0.0)
    meter = Meter(0, 1, "autoencoder", clock)
    with meter.phase("forward"):
        clock.now += seconds
    meter.step_done(items=4)
    counts = meter.snapshot()["totals"]["phases"]["forward"]["counts"]
    assert [place for place, count in enumerate(counts) if count] == [bucket]


def test_the_histogram_holds_finished_steps_and_only_phases_they_spent_time_in():
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    for _ in range(2):  # two micro-batches of one step add up
        with meter.phase("forward"):
            clock.now += 0.5
    meter.step_done(items=3, bytes=100, flops=1e9)
    meter.step_done(items=0)  # this rank's share of the step was empty
    with meter.phase("forward"):
        clock.now += 7
    totals = meter.snapshot()["totals"]
    assert totals["phases"]["forward"] == {"seconds": 1.0, "counts": [int(bound == 1.0) for bound in BUCKETS] + [0]}
    assert sum(totals["phases"]["checkpoint"]["counts"]) == 0
    assert (totals["items"], totals["bytes"], totals["flops"]) == (3, 100, 1e9)
    assert totals["states"]["compute"] == 8


def test_a_snapshot_is_plain_json_and_does_not_change_afterwards():
    clock = Clock()
    meter = Meter(3, 8, "diffusion", clock)
    meter.gauges["loss"] = 0.5
    before = meter.snapshot()
    text = json.dumps(before)
    meter.gauges["loss"] = 0.25
    with meter.phase("forward"):
        clock.now += 1
    meter.step_done(items=1)
    assert json.dumps(before) == text
    assert (before["rank"], before["ranks"], before["stage"]) == (3, 8, "diffusion")
    assert before["process"] == meter.snapshot()["process"] != Meter(3, 8, "diffusion", clock).snapshot()["process"]


def test_a_snapshot_from_another_thread_sees_the_phase_that_is_running():
    clock = Clock()
    meter = Meter(0, 1, "autoencoder", clock)
    seen = []
    with meter.phase("data_wait"):
        clock.now += 30
        thread = threading.Thread(target=lambda: seen.append(meter.snapshot()))
        thread.start()
        thread.join()
    assert seen[0]["totals"]["states"]["data_wait"] == 30


@pytest.mark.parametrize("misuse", [lambda meter: meter.phase("fast_forward").__enter__(), lambda meter: meter.gauges.update(lost=1.0)])
def test_a_misspelt_phase_or_gauge_does_not_pass_silently(misuse):
    meter = Meter(0, 1, "autoencoder")
    with pytest.raises(AssertionError, match=r"fast_forward|lost"):
        misuse(meter)
        meter.snapshot()


@pytest.mark.starts
def test_the_meter_can_be_built_before_anything_heavy_is_imported():
    code = "import sys; before = set(sys.modules); import cluster.telemetry.meter; print(*(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"cluster"}


def train(meter, clock, steps=1, items=2, seconds=1.0):
    for _ in range(steps):
        with meter.phase("forward"):
            clock.now += seconds
        meter.step_done(items=items)
    return meter.snapshot()


def test_the_tally_sums_over_ranks_and_keeps_what_replaced_processes_counted():
    clock = Clock()
    tally = Tally()
    for rank in (0, 1):
        tally.update(train(Meter(rank, 2, "autoencoder", clock), clock, steps=3))
    assert tally.stages()["autoencoder"]["items"] == 12
    replaced = Meter(0, 2, "autoencoder", clock)
    tally.update(replaced.snapshot())
    assert tally.stages()["autoencoder"]["items"] == 12
    tally.update(train(replaced, clock, steps=1))
    totals = tally.stages()["autoencoder"]
    assert totals["items"] == 14
    assert totals["phases"]["forward"]["counts"][BUCKETS.index(1.0)] == 7


def test_a_late_snapshot_changes_nothing():
    clock = Clock()
    tally = Tally()
    meter = Meter(0, 1, "autoencoder", clock)
    early, late = train(meter, clock), train(meter, clock)
    tally.update(late)
    tally.update(early)
    assert tally.stages()["autoencoder"]["items"] == 4
    tally.update(train(Meter(0, 1, "autoencoder", clock), clock))
    tally.update(late)
    assert tally.stages()["autoencoder"]["items"] == 6


def test_a_smaller_worker_group_drops_ranks_but_not_what_they_counted():
    clock = Clock()
    tally = Tally()
    for rank in range(4):
        tally.update(train(Meter(rank, 4, "autoencoder", clock), clock))
    tally.update(train(Meter(0, 2, "autoencoder", clock), clock))
    assert [snapshot["rank"] for snapshot in tally.ranks()] == [1, 0]
    assert tally.stages()["autoencoder"]["items"] == 10


def test_a_rank_that_moves_to_the_next_stage_leaves_its_numbers_in_the_first():
    clock = Clock()
    tally = Tally()
    for stage in ("autoencoder", "diffusion"):
        meter = Meter(0, 1, stage, clock)
        meter.gauges["progress_items"] = 2.0
        tally.update(train(meter, clock))
    assert {stage: totals["items"] for stage, totals in tally.stages().items()} == {"autoencoder": 2, "diffusion": 2}
    assert tally.gauges() == {"autoencoder": {"progress_items": 2.0}, "diffusion": {"progress_items": 2.0}}


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["step", "new", "late"])), max_size=40))
def test_no_sum_ever_falls(events):
    clock = Clock()
    tally = Tally()
    meters = [Meter(rank, 3, "autoencoder", clock) for rank in range(3)]
    sent, before = [], [0.0] * 3
    for rank, event in events:
        if event == "new":
            meters[rank] = Meter(rank, 3, "autoencoder", clock)
        sent.append(train(meters[rank], clock))
        tally.update(sent[0] if event == "late" else sent[-1])
        totals = tally.stages()["autoencoder"]
        now = [totals["items"], sum(totals["states"].values()), sum(totals["phases"]["forward"]["counts"])]
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now
