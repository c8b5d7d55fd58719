"""What the driver tells of a stage's ranks, in the order in which it does, and what the books have of it."""

from collections.abc import Iterator
from contextlib import closing
from io import StringIO

import pytest

from cluster.telemetry.accounts import TaskBooks
from cluster.telemetry.books import Berth
from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter
from cluster.telemetry.monitor import StageMonitor
from cluster.telemetry.receipt import receipt
from tests.cluster.telemetry.test_meter import Clock

pytestmark = pytest.mark.starts

STAGE, HOST = "diffusion", Berth("host", 36.0, 1.0)


class Driver:
    """A stage of two ranks as `launch` and `Group` tell of it; time passes when told."""

    def __init__(self, exporter: Exporter, clock: Clock, fault: str = ""):
        self.clock, self.exporter, self.progress = clock, exporter, 0.0
        self.monitor = StageMonitor(STAGE, exporter, Display(StringIO()), fault)

    def place(self, seconds: float) -> None:
        self.monitor.placing(2)
        self.clock.now += seconds
        self.monitor.placed()

    def start(self, seconds: float, ranks: int = 2) -> None:
        """Ray Train starts for 3 s, then holds the places."""
        self.monitor.hold([HOST] * ranks, self.progress, 0.0, 0.0, 0.0)
        self.clock.now += 3
        self.since = self.clock.now
        self.monitor.hold([HOST] * ranks, self.progress, self.since, 0.0, 0.0)
        self.load(seconds, ranks)

    def load(self, seconds: float, ranks: int = 2) -> None:
        self.meters = [Meter(rank, ranks, STAGE, self.clock) for rank in range(ranks)]
        self.clock.now += seconds
        for meter in self.meters:
            meter.begin()

    def step(self, seconds: float) -> None:
        self.clock.now += seconds
        self.progress += 10
        for meter in self.meters:
            meter.gauges["progress_items"] = self.progress
            meter.step_done(items=5)
            self.monitor.take(meter.snapshot())

    def end(self, seconds: float, **how: bool) -> None:
        """The places are given back, and Ray Train ends 4 s later."""
        self.clock.now += seconds
        until = self.clock.now
        self.clock.now += 4
        self.monitor.hold([HOST], self.progress, self.since, 0.0, until)
        self.monitor.give_back(**how)

    @property
    def states(self) -> dict[str, float]:
        return {state: seconds for state, seconds in receipt([self.exporter.books.record()])["states"].items() if seconds}


@pytest.fixture
def driver() -> Iterator[Driver]:
    clock = Clock()
    with closing(Exporter("demo", 1, clock=clock)) as exporter:
        yield Driver(exporter, clock)


def test_a_stage_from_waiting_to_its_end_has_nothing_of_what_ray_train_takes_for_itself(driver: Driver) -> None:
    driver.place(30)
    driver.start(10)
    driver.step(5)
    driver.end(1)
    assert driver.states == {"waiting": 60, "starting": 20, "compute": 10, "idle": 2}
    assert receipt([driver.exporter.books.record()])["cost"] == pytest.approx(32 * 0.01)


def test_ranks_that_fail_and_start_again_where_they_were_lose_the_time_to_the_fault(driver: Driver) -> None:
    driver.place(0)
    driver.start(10)
    driver.step(5)
    driver.step(5)
    driver.clock.now += 6  # until it is noticed
    driver.monitor.restarted("lost", "rank 1 is gone")
    driver.progress = 10.0
    driver.monitor.again(driver.progress)
    driver.clock.now += 2
    driver.load(8)
    driver.step(5)
    driver.step(5)
    driver.end(0)
    assert driver.states == {"starting": 20, "compute": 30, "recovery": 2 * (6 + 2 + 8), "replay": 10}
    made = receipt([driver.exporter.books.record()])
    assert [(one["class"], one["text"], one["progress"]) for one in made["faults"]] == [("lost", "rank 1 is gone", 20)]
    assert made["restarts"] == {"lost": 1}


def test_seconds_until_ray_gives_the_places_or_gives_them_again_wait_and_cost_nothing(driver: Driver) -> None:
    asked = driver.clock.now
    driver.clock.now += 4
    driver.monitor.hold([HOST] * 2, 0.0, asked, 3.0, 0.0)
    driver.load(6)
    driver.step(5)
    driver.clock.now += 6
    driver.monitor.restarted("lost", "rank 1 is gone")
    driver.monitor.again(driver.progress)
    driver.clock.now += 2
    for _ in range(2):
        driver.monitor.hold([HOST] * 2, 0.0, asked, 3.0 + 1.5, 0.0)
    driver.load(8)
    driver.step(5)
    driver.monitor.give_back()
    assert driver.states == {"waiting": 2 * (3 + 1.5), "starting": 2 * 7, "compute": 20, "recovery": 2 * (6 + 0.5 + 8)}
    made = receipt([driver.exporter.books.record()])
    assert made["faults"][0]["waiting"] == 3 and made["cost"] == pytest.approx(0.01 * made["held"])


def test_ranks_that_fail_for_another_place_and_those_that_leave_for_more_room(driver: Driver) -> None:
    driver.place(0)
    driver.start(10)
    driver.step(5)
    driver.clock.now += 7
    driver.monitor.restarted("lost", "the machine is gone")
    driver.end(0, failed=True)
    driver.place(60)
    driver.progress = 0.0
    driver.start(10, ranks=1)
    driver.step(5)
    driver.step(5)
    driver.monitor.reserve([HOST])
    driver.step(5)
    driver.monitor.release()
    driver.monitor.restarted("resized", "there is room for 1 more ranks")
    driver.end(1, left=True)
    driver.place(0)
    driver.start(10)
    driver.step(5)
    driver.end(0)
    made = receipt([driver.exporter.books.record()])
    lost, resized = made["faults"]
    assert (lost["recovery"], lost["replay"], lost["waiting"]) == (14 + 10, 5, 120)
    assert (resized["recovery"], resized["replay"], resized["waiting"]) == (1 + 20, 0, 0)
    assert driver.states == {"starting": 20, "compute": 10 + 10 + 10, "idle": 5, "waiting": 120, "recovery": 45, "replay": 5}


def test_restarts_of_the_receipt_are_those_that_prometheus_is_told_and_neither_the_end_of_the_life_nor_failed_tasks(driver: Driver) -> None:
    exporter = driver.exporter
    tasks = TaskBooks(exporter.books, "latents", "encode", lambda address: HOST)
    tasks.begin(0)
    tasks.lose(0, "lost", "the process of a task is gone")
    driver.place(0)
    driver.start(10)
    for number in range(3):
        driver.monitor.restarted("hang", f"rank 1 hangs ({number})")
        driver.monitor.again(0.0)
    driver.monitor.blame("hang", "rank 1 hangs (3)")
    driver.end(0, failed=True)
    exporter.books.ends("hang", STAGE, "rank 1 hangs (3)")
    (told,) = [metric for metric in exporter.collect() if metric.name == "reactdiff_restarts"]
    made = receipt([exporter.books.record()])
    assert made["restarts"] == {sample.labels["class"]: sample.value for sample in told.samples if sample.value} == {"hang": 3}
    assert [fault["class"] for fault in made["faults"]] == ["lost", *["hang"] * 4]


def test_ranks_that_are_gone_are_told_of_no_more_and_no_counter_falls(driver: Driver) -> None:
    driver.place(0)
    driver.start(10)
    for meter in driver.meters:
        meter.gauges.update(peak_flops=1e12, power_watts=400.0, temperature_celsius=60.0)
    driver.step(5)
    of_ranks = {"reactdiff_rank_info", "reactdiff_ranks", "reactdiff_peak_flops", "reactdiff_power_watts", "reactdiff_temperature_celsius"}
    before = scraped(driver.exporter)
    assert of_ranks <= {name for name, _ in before}
    late = driver.meters[1].snapshot()
    driver.end(1)
    driver.monitor.take(late)
    after = scraped(driver.exporter)
    assert not of_ranks & {name for name, _ in after}
    counters = [key for key in before if key[0].endswith(("_total", "_bucket", "_count", "_sum"))]
    assert counters and [key for key in counters if after[key] < before[key]] == []
    assert after["reactdiff_items_processed_total", (STAGE,)] == after["reactdiff_progress_items", (STAGE,)] == 10


def scraped(exporter: Exporter) -> dict[tuple[str, tuple[str, ...]], float]:
    """Name, and labels beside run, life and trial -> value."""
    found = [sample for metric in exporter.collect() for sample in metric.samples]
    return {(one.name, tuple(one.labels.values())[3:]): one.value for one in found}


def test_what_a_stage_leaves_open_when_it_is_told_to_end_is_closed(driver: Driver) -> None:
    driver.place(0)
    driver.start(10)
    driver.step(5)
    driver.monitor.release()
    driver.monitor.give_back()
    assert driver.exporter.books.record()["held"] == [] and driver.states == {"starting": 20, "compute": 10}


def test_a_stage_that_an_earlier_life_lost_starts_on_the_account_of_that(driver: Driver) -> None:
    books = driver.exporter.books
    books.reach(STAGE, 10.0)
    books.owe(STAGE, fault := books.fault("driver", STAGE, "killed"))
    again = Driver(driver.exporter, driver.clock, fault)
    again.place(0)
    again.start(10)
    again.step(5)
    again.step(5)
    again.end(0)
    assert again.states == {"recovery": 20, "replay": 10, "compute": 10}


def test_a_wait_that_a_silent_cluster_broke_off_is_not_counted_on_when_it_begins_anew(driver: Driver) -> None:
    driver.monitor.placing(2)
    driver.clock.now += 5
    driver.monitor.placing(2)
    driver.clock.now += 5
    driver.monitor.placed()
    driver.clock.now += 5
    assert driver.states == {"waiting": 20}
