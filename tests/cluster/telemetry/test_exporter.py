"""The exporter: what a scrape says, and how a Prometheus finds it."""

import json
import os
import platform
import threading
import urllib.request
from contextlib import closing

import pytest

from cluster.telemetry.books import Berth
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter

pytestmark = pytest.mark.starts


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def exporter(clock):
    with closing(Exporter("demo-1234abcd", life=3, clock=clock)) as exporter:
        yield exporter


def step(meter, clock, items=4):
    for phase, seconds in (("data_wait", 0.125), ("forward", 0.25), ("backward", 0.5), ("optimizer", 0.0625)):
        with meter.phase(phase):
            clock.now += seconds
    meter.step_done(items=items, bytes=1000, flops=2e9)


def scrape(exporter):
    """The endpoint's samples: `name{labels without run, life and trial}` -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    samples = {}
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            for label in ('run="demo-1234abcd"', 'life="3"', 'trial=""'):
                assert label in name
                name = name.replace(label, "")
            name, labels = name.rstrip("}").split("{")
            samples[f"{name}{{{','.join(filter(None, labels.split(',')))}}}"] = float(value)
    return samples


def scrape_to_the_end(exporter):
    """A scrape the exporter knows of: the client may have read all before the server notes that it wrote all."""
    scrape(exporter)
    while not exporter.drain(0):
        threading.Event().wait(0.001)


def test_a_scrape_shows_sums_over_ranks_and_gauges_per_rank(exporter, clock):
    for rank in (0, 1):
        meter = Meter(rank, 2, "autoencoder", clock)
        meter.gauges.update(loss=0.5, gradient_norm=2.0, learning_rate=1e-4, progress_items=8)
        meter.gauges.update(peak_memory_bytes=100 + rank, peak_flops=1e12)
        step(meter, clock)
        exporter.update(meter.snapshot())
    exporter.restarts("preempted")
    samples = scrape(exporter)
    expected = {
        'reactdiff_items_processed_total{stage="autoencoder"}': 8,
        'reactdiff_read_bytes_total{stage="autoencoder"}': 2000,
        'reactdiff_flops_total{stage="autoencoder"}': 4e9,
        'reactdiff_progress_items{stage="autoencoder"}': 8,
        'reactdiff_loss{stage="autoencoder"}': 0.5,
        'reactdiff_gradient_norm{stage="autoencoder"}': 2.0,
        'reactdiff_learning_rate{stage="autoencoder"}': 1e-4,
        'reactdiff_peak_memory_bytes{rank="0",stage="autoencoder"}': 100,
        'reactdiff_peak_memory_bytes{rank="1",stage="autoencoder"}': 101,
        'reactdiff_peak_flops{rank="1",stage="autoencoder"}': 1e12,
        f'reactdiff_rank_info{{host="{platform.node()}",pid="{os.getpid()}",rank="1",stage="autoencoder"}}': 1,
        'reactdiff_restarts_total{class="preempted"}': 1,
        'reactdiff_ranks{phase="startup",stage="autoencoder"}': 2,
        'reactdiff_store_faults_total{stage="autoencoder"}': 0,
        'reactdiff_cost_dollars{}': 0,
        'reactdiff_step_seconds_bucket{le="0.1",phase="forward",stage="autoencoder"}': 0,
        'reactdiff_step_seconds_bucket{le="0.25",phase="forward",stage="autoencoder"}': 2,
        'reactdiff_step_seconds_bucket{le="+Inf",phase="forward",stage="autoencoder"}': 2,
        'reactdiff_step_seconds_count{phase="forward",stage="autoencoder"}': 2,
        'reactdiff_step_seconds_sum{phase="forward",stage="autoencoder"}': 0.5,
    }
    assert {name: samples[name] for name in expected} == expected


def test_the_books_of_the_life_are_served_with_what_it_cost_and_may_cost(exporter, clock):
    exporter.books.book("autoencoder", {"compute": 1_800_000, "data_wait": 250}, exporter.books.now(), Berth("host", 4.0, 0.5))
    exporter.money(spent_before=2.0, budget=2.5)
    samples = scrape(exporter)
    expected = {
        'reactdiff_goodput_seconds_total{stage="autoencoder",state="compute"}': 1800,
        'reactdiff_goodput_seconds_total{stage="autoencoder",state="data_wait"}': 0.25,
        "reactdiff_budget_dollars{}": 2.5,
    }
    assert {name: samples[name] for name in expected} == expected
    assert samples["reactdiff_cost_dollars{}"] == pytest.approx(3.0, abs=1e-3)


def test_a_class_of_failures_is_told_before_its_first_restart(exporter):
    name = 'reactdiff_restarts_total{{class="{}"}}'
    samples = scrape(exporter)
    assert [samples[name.format(kind)] for kind in ("storage", "disk", "hang", "preempted", "no_place", "lost", "resized")] == [0] * 7
    exporter.restarts("lost")
    exporter.restarts("resized")
    samples = scrape(exporter)
    assert [samples[name.format(kind)] for kind in ("hang", "lost", "resized")] == [0, 1, 1]


def test_where_a_run_is_what_tasks_are_done_and_what_ended_it_are_told(exporter):
    exporter.at("latents")
    exporter.tasks_done("latents", 3)
    samples = scrape(exporter)
    assert samples['reactdiff_at{stage="latents"}'] == 1 and samples['reactdiff_tasks_done_total{stage="latents"}'] == 3
    exporter.failed("non_finite")
    samples = scrape(exporter)
    assert samples['reactdiff_failed{class="non_finite"}'] == 1 and samples['reactdiff_at{stage="latents"}'] == 0


def test_requests_to_storage_that_fail_are_counted_before_a_step_is_done(exporter, clock):
    meter = Meter(0, 1, "autoencoder", clock)
    meter.store_faults = lambda: 7
    exporter.update(meter.snapshot())
    assert scrape(exporter)['reactdiff_store_faults_total{stage="autoencoder"}'] == 7


def test_the_number_of_series_grows_with_the_ranks_only_by_their_gauges(exporter, clock):
    def series(ranks):
        for rank in range(ranks):
            meter = Meter(rank, ranks, "diffusion", clock)
            meter.gauges.update(loss=1.0, peak_memory_bytes=1, peak_flops=1)
            step(meter, clock)
            exporter.update(meter.snapshot())
        return len(scrape(exporter))

    assert series(20) - series(10) == 10 * 3


def test_counters_do_not_fall_when_the_worker_group_restarts_within_a_life(exporter, clock):
    name, seen = 'reactdiff_items_processed_total{stage="autoencoder"}', []
    for _ in range(3):
        meter = Meter(0, 1, "autoencoder", clock)
        exporter.update(meter.snapshot())
        seen.append(scrape(exporter).get(name))
        step(meter, clock)
        exporter.update(meter.snapshot())
        seen.append(scrape(exporter)[name])
    assert seen == [0, 4, 4, 8, 8, 12]


def test_a_loss_that_is_not_a_number_is_shown_as_such(exporter, clock):
    meter = Meter(0, 1, "autoencoder", clock)
    meter.gauges["loss"] = float("nan")
    exporter.update(meter.snapshot())
    value = scrape(exporter)['reactdiff_loss{stage="autoencoder"}']
    assert value != value


def test_drain_returns_at_once_when_nobody_scrapes(exporter, clock):
    exporter.update(Meter(0, 1, "autoencoder", clock).snapshot())
    naps = []
    assert exporter.drain(60, sleep=naps.append) is False
    assert naps == []


def test_drain_waits_for_a_scrape_of_the_latest_numbers_and_no_longer(exporter, clock):
    scrape_to_the_end(exporter)
    exporter.update(Meter(0, 1, "autoencoder", clock).snapshot())
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            scrape_to_the_end(exporter)

    assert exporter.drain(60, sleep) is True
    assert len(naps) == 3
    assert exporter.drain(60, sleep) is True
    assert len(naps) == 3


def test_drain_gives_up_when_the_scraper_has_gone(exporter):
    scrape_to_the_end(exporter)
    exporter.restarts("hang")
    naps = []
    assert exporter.drain(2.0, naps.append) is False
    assert sum(naps) == pytest.approx(2.0)


def test_a_target_file_appears_whole_and_goes_with_the_exporter(tmp_path):
    folder = tmp_path / "targets"
    with closing(Exporter("demo", life=1, trial="t7")) as exporter:
        exporter.write_target(folder)
        assert [path.name for path in folder.iterdir()] == ["demo+t7.json"]
        target = {"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"run": "demo", "life": "1", "trial": "t7"}}
        assert json.loads((folder / "demo+t7.json").read_text()) == [target]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("trial", [",".join(f"optim.lr.diffusion={i}" for i in range(20)), "data.split=a/b", "x\0y", "é" * 200, "."])
def test_any_trial_has_a_target_file_of_its_own_that_prometheus_watches(tmp_path, trial):
    with closing(Exporter("demo", 123456, trial)) as exporter, closing(Exporter("demo", 123456, f"{trial}2")) as other:
        exporter.write_target(tmp_path)
        other.write_target(tmp_path)
        files = list(tmp_path.glob("*.json"))
        assert sorted(json.loads(file.read_text())[0]["labels"]["trial"] for file in files) == sorted([trial, f"{trial}2"])
        assert all(len(file.name.encode()) < 240 for file in files)
    assert list(tmp_path.iterdir()) == []


def test_a_life_replaces_the_target_of_the_one_before_and_keeps_its_own(tmp_path):
    first, second = Exporter("demo", life=1), Exporter("demo", life=2)
    with closing(second):
        first.write_target(tmp_path)
        second.write_target(tmp_path)
        first.close()
        [target] = json.loads((tmp_path / "demo.json").read_text())
        assert target["labels"]["life"] == "2"


def test_a_port_that_is_taken_is_named_with_the_way_out(exporter):
    with pytest.raises(ValueError, match=rf"telemetry.port is {exporter.port}.*choose a free port, or 0"):
        Exporter("other", life=1, port=exporter.port)
