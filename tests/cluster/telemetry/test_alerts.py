"""Each alert fires where its cause happens in a real run, and none in a run that is well; the shipped rules, FACTOR times as fast."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from infra.dashboard import curves
from infra.objectstore import ObjectStore
from tests.cluster.data.test_stream_faults import copy
from tests.cluster.driver.test_ray_metrics import SILENT
from tests.cluster.support.damage import flip
from tests.cluster.support.faulty import TAR_RANGE, faulty_proxy
from tests.cluster.support.machines import RUN, Running, machines
from tests.cluster.telemetry.test_prometheus import INFRA, Server, faster
from tests.tiny import ROOT, job, make_shards, settings

pytestmark = pytest.mark.timeout(1800)
slow = pytest.mark.slow

FACTOR = 30
"""A minute of the rules is two seconds here."""

LIMIT = 600
"""Seconds in which an alert is to fire."""

LONG = ("optim.epochs=2000", "workers.count=1", "workers.cpus=1")
"""A run that lasts until it is killed."""


class Watched:
    """A run and the Prometheus that watches it."""

    def __init__(self, folder: Path, factor: int = FACTOR):
        self.folder, self.server = folder, Server(folder, "targets-one", factor)

    run: Running | None = None

    def start(self, shards: Path | str, *more: str, address: str = "local") -> Running:
        """The run `one`."""
        self.run = Running(shards, self.folder, "one", *LONG, *more, address=address)  # type: ignore[arg-type]
        return self.run

    @property
    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        rows = self.server.get("query", query='ALERTS{alertstate="firing"}')["result"]
        return {row["metric"]["alertname"].removeprefix("Reactdiff") for row in rows}

    def shown(self, query: str, begin: float) -> bool:
        """Whether a panel with this query has shown anything since then."""
        query = query.replace("$run", ".*").replace("$__rate_interval", "10s")
        return bool(self.server.get("query_range", query=query, start=begin, end=time.time(), step=1)["result"])

    def fires(self, *names: str) -> None:
        """Wait until these have fired, whether they go on or not."""
        seen: set[str] = set()

        def look() -> set[str]:
            seen.update(self.firing)
            return set(names) - seen

        for _ in range(LIMIT // 60):
            try:
                self.server.until(look, lambda missing: not missing)
                return
            except pytest.fail.Exception:
                continue
        pytest.fail(f"{set(names) - seen} did not fire, {seen} did: {self.run.said if self.run else ''}")

    def close(self) -> None:
        self.server.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with closing(Watched(tmp_path)) as one:
        yield one


def test_every_alert_is_made_to_fire_here() -> None:
    rules = [rule for group in yaml.safe_load((INFRA / "rules.yml").read_text())["groups"] for rule in group["rules"]]
    text = Path(__file__).read_text().partition("class Watched")[2]
    elsewhere = [name for rule in rules if (name := rule.get("alert")) and f'"{name.removeprefix("Reactdiff")}"' not in text]
    assert elsewhere == ["ReactdiffDriverSilent"], "through Ray's agents alone: tests/cluster/driver/test_ray_metrics.py"


def test_durations_are_divided_and_nothing_else() -> None:
    assert faster("rate(x[5m]) > 0.3 offset 1h\nfor: 10m\ntime() - y > 3600", 60) == (
        "rate(x[5000ms]) > 0.3 offset 60000ms\nfor: 10000ms\ntime() - y > 60"
    )


@slow
def test_cost_restarts_failure_and_an_old_checkpoint(watched: Watched, shards: Path) -> None:
    never = ("run.checkpoint_every=1000000", "run.checkpoint_minutes=0")
    run = watched.start(shards, *never, "telemetry.prices={any: 3600}", "telemetry.budget=1", "run.retries=3")
    watched.fires("CostAboveBudget")
    for number in range(1, 4):
        run.rank(0).kill()
        run.until_said("failed (lost)", number)
        if number < 3:
            run.until(lambda: run.trains(0))
    watched.fires("RestartsOften")
    watched.fires("CheckpointOld")
    run.rank(0).kill()
    watched.fires("Failed")
    assert run.end() == 75, run.said


@slow
def test_a_loss_that_is_not_finite(watched: Watched, shards: Path) -> None:
    run = watched.start(shards, "optim.lr=1e30", "optim.clip=0")
    watched.fires("LossNotFinite")
    assert run.end() == 1 and "non_finite" in run.said


@slow
@pytest.mark.alone  # ten seconds without a scrape are a silent driver here
def test_a_trial_that_diverges_wakes_nobody(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "with val", "train=8", "val=4", "test=4")
    (tmp_path / "sweep.yaml").write_text("name: s\nspace: {optim.lr.diffusion: [1.0e+30]}\nmetrics: {FRDist: min}\n")
    with closing(Watched(tmp_path, factor=6)) as watched:
        more = (f"telemetry.targets={watched.server.targets}", "model.space=attributes", "model.denoiser=transformer", "optim.clip=0")
        command = [sys.executable, ROOT / "jobs/tune.py", "--config", tmp_path / "sweep.yaml", *settings(shards, tmp_path), *more]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
            watched.fires("TrialFailed")
            said, _ = sweep.communicate()
        assert sweep.returncode == 1 and "no trial of sweep s has a defined FRDist" in said, said
        pages = watched.server.get("query", query="last_over_time(ALERTS{alertstate='firing', severity='page'}[1h])")["result"]
        assert [page["metric"]["alertname"] for page in pages] == []


@slow
def test_items_in_quarantine_and_a_driver_that_is_killed(watched: Watched, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "damaged", "train=8", "test=4")
    flip(shards, "train", 1, "a.au.npy")
    run = watched.start(shards, "data.on_corrupt=quarantine", "telemetry.budget=0")
    watched.fires("Quarantine")
    assert "DriverLost" not in watched.firing
    run.kill()
    watched.fires("DriverLost")
    watched.server.sees("count(time() - last_over_time(reactdiff_heartbeat_seconds[1h]) > 10)", {"1"})
    assert watched.server.values(SILENT) == set(), "one death is one page"


@slow
def test_a_driver_that_dies_again_and_again(tmp_path: Path, shards: Path) -> None:
    with closing(Watched(tmp_path, factor=6)) as watched:  # an hour of the rules is ten minutes here
        for life in range(1, 5):
            assert watched.server.values("ALERTS{alertname='ReactdiffLivesOften'}") == set()
            run = watched.start(shards)
            run.until(lambda life=life: watched.server.values(f"count(reactdiff_heartbeat_seconds{{life='{life}'}})"))
            run.kill()
        watched.fires("LivesOften")


@slow
def test_ranks_for_which_there_is_no_room(watched: Watched, shards: Path) -> None:
    with machines(1) as there:
        run = watched.start(shards, "workers.count=2", address=there.address)
        watched.fires("Waiting")
        assert "NoProgress" not in watched.firing, "who waits for room is not stuck"
        run.kill()


@slow
def test_tasks_of_which_none_is_done(tmp_path: Path, shards: Path) -> None:
    with closing(Watched(tmp_path, factor=120)) as watched:  # two hours of the rules are a minute here
        assert watched.start(shards, "optim.epochs=1").end() == 0
        run = watched.start(shards, "optim.epochs=1", "--stage", "latents")
        run.until(lambda: task_of(run))
        stopped = task_of(run)
        assert stopped
        stopped.suspend()
        watched.fires("TasksStuck")
        run.kill()
        stopped.kill()


def task_of(run: Running) -> psutil.Process | None:
    """The process of the run's that makes latents, once there is one."""
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if "ray::encode_shard" in one.cmdline() and one.environ().get(RUN) == str(run.folder):
                return one
    return None


@slow
def test_a_store_that_fails(shards: Path, tmp_path: Path, s3_url: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(shards, s3_url)
    # Five minutes of the rules are half a minute here, in which some steps end: with a step what was waited for in it is booked.
    with faulty_proxy(object_store.endpoint) as proxy, closing(Watched(tmp_path, factor=10)) as watched:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run = watched.start(s3_url, "data.read_ahead=1")
        run.until(lambda: run.progress >= 240)
        proxy.arm([*["busy"] * 3, ""] * 1000, TAR_RANGE)
        watched.fires("StoreFaults", "StarvedOfData", "GoodputLow")
        proxy.arm(["busy"] * 100_000)
        watched.fires("NoProgress")
        run.kill()


@slow
@pytest.mark.alone  # ten seconds without a scrape are a silent driver here
def test_a_run_that_is_well_sets_off_none_in_any_of_its_steps_and_every_panel_shows_it(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "with val", "train=20", "val=4", "test=8")
    done, seen, begin = threading.Event(), set[str](), time.time()

    def look() -> None:
        while not done.wait(0.5):
            seen.update(watched.firing)

    with closing(Watched(tmp_path, factor=6)) as watched:  # a start may then take the two minutes that a busy machine needs
        watching = threading.Thread(target=look)
        watching.start()
        try:
            told = (f"telemetry.targets={watched.server.targets}", "telemetry.prices={any: 1}", "telemetry.budget=100")
            more = ("run.name=one", "optim.epochs=20", "evaluation.watch=1")
            job("train", "--config", ROOT / "jobs/configs/demo.yaml", *settings(shards, tmp_path), *told, *more)
        finally:
            done.set()
            watching.join()
        empty = {curve.title for curve in curves() if not watched.shown(curve.query, begin)}
    assert seen == set()
    of_gpus = {"Model FLOPs utilisation", "Power watts", "Temperature celsius", "Xid"}
    assert empty <= {"Alerts", "Failed", "Restarts in an hour", *of_gpus}, "there is no GPU, and nothing went wrong"
