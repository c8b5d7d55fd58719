"""A run's numbers reach a Prometheus through Ray's own agents, wherever in the cluster its driver is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest

from cluster.driver.ray_metrics import RayMetrics, told_to_ray
from cluster.telemetry.exporter import Exporter
from tests.cluster.support.machines import RAY
from tests.cluster.telemetry.test_prometheus import TIMEOUT, Server
from tests.tiny import ROOT

OPEN = {"RAY_AUTH_MODE": "disabled"}

DRIVER = """
import sys, ray
from cluster.driver.ray_metrics import told_to_ray
from cluster.telemetry.exporter import Exporter
ray.init(address=sys.argv[1], log_to_driver=False)
exporter = Exporter("demo", life=int(sys.argv[2]))
exporter.at("diffusion")
exporter.money(7.0, 9.0)
with told_to_ray(exporter):
    print("told", flush=True)
    sys.stdin.readline()
exporter.close()
"""
"""It ends at once: what it told last reaches the agent, whom a process tells every 10 s, since Ray tells it at the process's end, too."""


SILENT = "count(ALERTS{alertname='ReactdiffDriverSilent', alertstate='firing'})"


class Kept:
    """What an agent is told, without one."""

    values: ClassVar[dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}

    def __init__(self, name: str, tag_keys: tuple[str, ...]):
        self.name, self.keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.keys
        self.values[self.name, tuple((key, value) for key, value in tags.items() if key not in ("run", "life", "trial"))] = value


@pytest.mark.starts
def test_what_is_no_more_is_0_and_a_run_that_ends_is_at_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.driver.ray_metrics.Gauge", Kept)
    with closing(Exporter("demo", life=1)) as exporter:
        metrics = RayMetrics(exporter)
        exporter.at("latents")
        exporter.tasks_done("latents", 3)
        metrics.tell()
        assert Kept.values["reactdiff_at", (("stage", "latents"),)] == 1
        assert Kept.values["reactdiff_tasks_done_total", (("stage", "latents"),)] == 3
        exporter.at("diffusion")
        metrics.tell()
        assert Kept.values["reactdiff_at", (("stage", "latents"),)] == 0 and Kept.values["reactdiff_at", (("stage", "diffusion"),)] == 1
        exporter.money(1.0, 9.0)
        metrics.tell()
        exporter.money(1.0, 0.0)
        metrics.tell()
        assert Kept.values["reactdiff_budget_dollars", ()] == 0
        Kept.values.clear()
        metrics.tell()
        assert ("reactdiff_budget_dollars", ()) not in Kept.values, "told once that it is no more"
        metrics.tell(over=True)
        assert Kept.values["reactdiff_at", (("stage", "diffusion"),)] == 0
        assert Kept.values["reactdiff_tasks_done_total", (("stage", "latents"),)] == 3


@pytest.mark.starts
def test_without_a_cluster_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("cluster.driver.ray_metrics.RayMetrics", never)
    monkeypatch.setattr("cluster.driver.ray_metrics.ray.is_initialized", lambda: False)
    with closing(Exporter("demo", life=1)) as exporter, told_to_ray(exporter):
        pass


@contextmanager
def a_node() -> Iterator[tuple[str, Path]]:
    """A head with its agent, and the file in which its dashboard lists all agents."""
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = clean | OPEN | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        command = [RAY, "start", "--head", "--port=0", "--num-cpus=1", "--include-dashboard=true", "--block", "--disable-usage-stats"]
        log = Path(folder) / "said"
        with log.open("w") as out:
            head = subprocess.Popen(
                [*map(str, command), "--object-store-memory=80000000"], env=environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            listed = Path(folder) / "ray" / "prom_metrics_service_discovery.json"
            current = Path(folder) / "ray" / "ray_current_cluster"
            for _ in range(TIMEOUT * 20):
                if listed.exists() and json.loads(listed.read_text()) and current.exists() and current.read_text():
                    break
                assert head.poll() is None, log.read_text()
                with suppress_wait():
                    head.wait(0.1)
            yield current.read_text().strip(), listed
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


@contextmanager
def suppress_wait() -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired:
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_prometheus_on_the_head_finds_drivers_by_their_node_s_agent_and_hears_which_of_them_is_killed(tmp_path: Path) -> None:
    with a_node() as (address, listed):
        (tmp_path / "targets").mkdir()
        (tmp_path / "targets" / "ray.json").symlink_to(listed)

        def driver(life: int) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", DRIVER, address, str(life)]
            started = subprocess.Popen(command, cwd=ROOT, env=os.environ | OPEN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert started.stdout and started.stdout.readline() == "told\n"
            server.sees(f"reactdiff_budget_dollars{{run='demo', life='{life}'}}", {"9"})
            server.sees(f"max by (run, stage) (reactdiff_at{{life='{life}'}})", {"1"})
            return started

        with closing(Server(tmp_path, factor=2, config="ray.yml")) as server:  # half a minute without a word is a silent driver
            first = driver(3)
            server.sees("count(count_over_time(reactdiff_heartbeat_seconds[1h]) >= 20)", {"1"})
            assert server.values(SILENT) == set(), "it lives"
            first.communicate("\n")
            server.sees("max by (run, stage) (last_over_time(reactdiff_at[1h]))", {"0"})
            server.sees("count(time() - last_over_time(reactdiff_heartbeat_seconds[1h]) > 40)", {"1"})
            assert server.values(SILENT) == set(), "it ended in order"
            second = driver(4)
            second.kill()
            second.communicate()
            server.sees(SILENT, {"1"})
