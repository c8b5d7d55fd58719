"""A real Prometheus finds a run's exporter, scrapes it, and counts exactly over restarts."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import closing
from functools import cached_property

import pytest
import yaml

from cluster.telemetry.books import Berth
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter
from cluster.telemetry.metrics import METRICS
from infra.dashboard import FILE, curves, dashboard
from tests.tiny import ROOT

pytestmark = pytest.mark.starts

INFRA = ROOT / "infra" / "prometheus"
TIMEOUT = 60
"""Seconds after which something that was to happen is taken not to happen; Prometheus takes up new targets every 5."""


def program(name):
    """The path of a program of the Debian package `prometheus`."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed; run: apt-get update && apt-get install -y --no-install-recommends prometheus")
    return path


def promtool(*arguments, text=None):
    return subprocess.run([program("promtool"), *arguments], cwd=INFRA, input=text, capture_output=True, text=True, timeout=TIMEOUT)


class Server:
    """A Prometheus on a free loopback port with the project's configuration, watching a folder, ten times as fast.

    `factor` divides every duration of the rules, which are otherwise those that are shipped.
    """

    def __init__(self, folder, name="targets", factor=1, config="prometheus.yml"):
        self.targets = folder / name
        self.targets.mkdir(exist_ok=True)
        config = yaml.safe_load((INFRA / config).read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["file_sd_configs"] = [{"files": [f"{self.targets}/*.json"], "refresh_interval": "1s"}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(faster((INFRA / "rules.yml").read_text(), factor))
        self.log = folder / "log"
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:0"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([program("prometheus"), *flags], stderr=log)

    @cached_property
    def address(self):
        """Where it listens, which the system chose, as soon as it answers: until it is ready it says 503."""
        log = self.until(self.log.read_text, lambda text: "Server is ready to receive web requests" in text)
        return re.search(r'msg="Listening on" address=(\S+)', log)[1]

    def until(self, look, enough):
        """What is seen, as soon as it is enough."""
        for _ in range(TIMEOUT * 10):
            if enough(seen := look()):
                return seen
            assert self.process.poll() is None, f"prometheus ended: {self.log.read_text()}"
            time.sleep(0.1)
        pytest.fail(f"after {TIMEOUT} s of waiting there was only {seen}")

    def get(self, path, **parameters):
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def values(self, expression):
        """The values in the instant vector of an expression."""
        return {row["value"][1] for row in self.get("query", query=expression)["result"]}

    def sees(self, expression, values):
        """Wait until an expression has these values."""
        self.until(lambda: self.values(expression), values.__eq__)

    def close(self):
        self.process.terminate()
        self.process.wait(TIMEOUT)


@pytest.fixture
def server(tmp_path):
    with closing(Server(tmp_path)) as server:
        yield server


SECONDS = {"s": 1, "m": 60, "h": 3600}


def faster(rules, factor):
    """The rules with durations divided: of ranges, offsets, `for`, and of ages."""
    pattern = re.compile(r"(\[|offset |for: )(\d+)([smh])\b")
    rules = pattern.sub(lambda found: f"{found[1]}{1000 * int(found[2]) * SECONDS[found[3]] // factor}ms", rules)
    return re.sub(r"> (3600|60)\b", lambda found: f"> {int(found[1]) / factor:g}", rules)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def group(ranks, clock):
    return [Meter(rank, ranks, "autoencoder", clock) for rank in range(ranks)]


def train(meters, exporter, clock, steps):
    """Steps of 1 s and 10 items a rank, one rank after the other on the one clock; the exporter is told after each."""
    for _ in range(steps):
        for meter in meters:
            for phase, seconds in (("data_wait", 0.125), ("forward", 0.25), ("backward", 0.5), ("optimizer", 0.125)):
                with meter.phase(phase):
                    clock.now += seconds
            meter.step_done(items=10, bytes=100, flops=1e9)
            exporter.books.book("autoencoder", {"data_wait": 125, "compute": 875}, exporter.books.now(), Berth("host", 3.6, 1.0))
            meter.gauges.update(loss=0.5, gradient_norm=1.0, learning_rate=1e-4, peak_memory_bytes=1e9, peak_flops=1e12)
            meter.gauges["checkpoint_time_seconds"] = 0.0
            meter.gauges["progress_items"] = meter.gauges.get("progress_items", 0) + 10 * len(meters)
            exporter.update(meter.snapshot())


def test_items_are_exact_over_a_restart_of_the_workers_and_of_the_driver(server):
    clock = Clock()
    with closing(Exporter("demo", life=1, clock=clock)) as exporter:
        exporter.write_target(server.targets)
        train(group(2, clock), exporter, clock, steps=20)
        server.sees("reactdiff_progress_items", {"400"})
        exporter.restarts("preempted")
        train(group(2, clock), exporter, clock, steps=5)
        assert exporter.drain(TIMEOUT), "the last numbers of life 1 were not scraped"
        server.sees("sum(reactdiff_items_processed_total)", {"500"})  # a scrape that took too long is not kept: the next one is

    with closing(Exporter("demo", life=2, clock=clock)) as exporter:
        exporter.write_target(server.targets)
        meters = group(1, clock)
        train(meters, exporter, clock, steps=10)
        server.sees("reactdiff_progress_items{life='2'}", {"100"})
        train(meters, exporter, clock, steps=20)
        assert exporter.drain(TIMEOUT), "the last numbers of life 2 were not scraped"
        server.sees("reactdiff_progress_items{life='2'}", {"300"})

        assert server.values("sum by (life) (max_over_time(reactdiff_items_processed_total{run='demo'}[10m]))") == {"500", "300"}
        assert server.values("sum(max_over_time(reactdiff_items_processed_total{run='demo'}[10m]))") == {"800"}
        assert server.values("sum by (phase) (max_over_time(reactdiff_step_seconds_count[10m])) > 0") == {"80"}
        assert server.values("sum(max_over_time(reactdiff_restarts_total{class='preempted'}[10m]))") == {"1"}
        # Two ranks with 25 steps of a second each, then one rank with 30.
        assert server.values("sum(max_over_time(reactdiff_goodput_seconds_total[10m]))") == {str(50 + 30)}

        server.sees("round(sum(run:reactdiff_goodput:share5m), 0.001)", {"1"})
        server.sees("count(run:reactdiff_mfu:ratio_rate5m > 0)", {"1"})
        rules = [rule for one in server.get("rules")["groups"] for rule in one["rules"]]
        assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}


def test_every_panel_of_the_dashboard_has_a_query_that_returns_data(server):
    clock = Clock()
    with closing(Exporter("demo", life=1, trial="t1", clock=clock)) as exporter:
        exporter.write_target(server.targets)
        exporter.failed("hang")  # which an alert says
        exporter.at("autoencoder")
        exporter.money(1.0, 2.0)
        meters = group(1, clock)
        meters[0].gauges.update(val_progress_items=1.0, val_frcorr=0.5, val_frdist=2.0, quarantined_items=1)
        meters[0].gauges.update(power_watts=400.0, temperature_celsius=60.0, xid=0.0)
        for done in range(40):
            exporter.restarts("hang")
            exporter.tasks_done("latents", done)
            train(meters, exporter, clock, steps=1)
            server.until(lambda scraped=exporter._scraped: exporter._scraped > scraped, bool)
            if done > 3 and not (empty := [curve.title for curve in curves() if not data(server, curve.query)]):
                break
        assert empty == []


def data(server, query):
    return server.get("query", query=query.replace("$run", ".*").replace("$__rate_interval", "10s"))["result"]


def test_the_dashboard_shows_every_metric_and_is_the_one_that_is_shipped():
    shown = " ".join(curve.query for curve in curves())
    assert [metric.name for metric in METRICS if f"reactdiff_{metric.name}" not in shown] == []
    assert FILE.read_text() == dashboard(), "make dashboard"
    panels = json.loads(dashboard())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_monitor_says_where_it_is_and_when_a_sample_has_come(tmp_path):
    command = [sys.executable, ROOT / "infra/monitor.py", "--targets", tmp_path / "targets", "--data", tmp_path / "data", "--port", "0"]
    with closing(Exporter("demo", life=1)) as exporter:
        monitor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            said = [monitor.stdout.readline(), monitor.stdout.readline()]
            exporter.write_target(tmp_path / "targets")
            said.append(monitor.stdout.readline())
        finally:
            monitor.terminate()
            assert monitor.wait(TIMEOUT) == 0
            monitor.stdout.close()
    address = re.match(r"Prometheus: http://127\.0\.0\.1:\d+", said[0])[0].removeprefix("Prometheus: ")
    assert said[2] == f"a sample of run demo has come: {address}/graph?g0.expr=run:reactdiff_items_processed:rate1m\n"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/-/ready")


def test_up_tells_which_run_lost_its_driver(server):
    with closing(Exporter("lost", life=7)) as exporter:
        exporter.write_target(server.targets)
        target = server.targets / "lost.json"
        left = target.read_text()
        server.sees("up{run='lost', life='7'}", {"1"})
    target.write_text(left)  # a driver that is killed leaves its target behind
    server.sees("up{run='lost', life='7'}", {"0"})


def test_configuration_rules_and_their_own_tests_pass_promtool():
    for arguments in (("check", "config", "prometheus.yml"), ("check", "config", "ray.yml"), ("test", "rules", "rules_test.yml")):
        done = promtool(*arguments)
        assert done.returncode == 0, f"promtool {' '.join(arguments)}: {done.stdout}{done.stderr}"


def test_every_rule_is_tested_and_every_metric_it_names_is_exported():
    rules = [rule for one in yaml.safe_load((INFRA / "rules.yml").read_text())["groups"] for rule in one["rules"]]
    tests = (INFRA / "rules_test.yml").read_text()
    assert [name for rule in rules if (name := rule.get("record") or rule.get("alert")) not in tests] == []
    named = {name for rule in rules for name in re.findall(r"(?<![\w:])reactdiff_\w+", rule["expr"])}
    assert named - set(re.findall(r"^# TYPE (\S+)", exposition(), re.M)) == {"reactdiff_step_seconds_bucket"}


def test_the_exposition_passes_promtools_lint():
    done = promtool("check", "metrics", text=exposition())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def exposition():
    """What an exporter with every metric says."""
    clock = Clock()
    with closing(Exporter("demo", life=1, trial="t1", clock=clock)) as exporter:
        exporter.at("autoencoder")
        exporter.tasks_done("latents", 3)
        exporter.money(1.0, 2.0)
        exporter.failed("hang")
        exporter.at("autoencoder")
        train(group(1, clock), exporter, clock, steps=1)
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics") as answer:
            return answer.read().decode()
