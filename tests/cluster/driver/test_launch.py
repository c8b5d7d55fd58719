"""What a stage's driver does of what becomes of its ranks: it starts them again, elsewhere, later or not at all."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pytest
from ray.train import ControllerError, WorkerGroupError

from cluster.driver import launch as launching
from cluster.driver.interruption import Enough
from cluster.driver.launch import launch
from cluster.runtime import placement
from cluster.runtime.failures import StageFailed
from cluster.runtime.nodes import Node
from cluster.runtime.placement import Gang, NoPlace, fit
from cluster.storage import StorageError, open_store
from cluster.telemetry.books import Berth
from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.monitor import StageMonitor
from cluster.training.job import Job
from tests.cluster.support.machines import STAGE
from tests.tiny import Trained, tiny


def test_no_stage_begins_with_an_error_of_ray_s_core(trained: Trained) -> None:
    said = trained.stdout + trained.stderr
    assert "PreemptionWatcher" not in said and "core_worker" not in said


class Ending:
    """A group that comes to the end of its stage in the moment in which the run is told to end."""

    hang = None

    def __init__(self, *_: object):
        """Start nothing."""

    def train(self, *_: object) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"progress": 12, "steps": 2, "left": False}


@pytest.mark.starts
def test_told_to_end_is_told_to_end_also_where_the_stage_ends_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launching, "Group", Ending)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node"])
    exporter, said = Exporter("run", 1, port=0), StringIO()
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(said) as display, pytest.raises(KeyboardInterrupt):
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None)
    assert "checkpoint at 12 items; the same command goes on from there" in said.getvalue()


class Leaving:
    """A group whose ranks leave, or fail, after they were told that they have come far enough."""

    hang, attempt, reason, why, fails = None, 0, "enough", "another trial is better", False

    def __init__(self, *given: object):
        self.enough = given[-1]

    def where(self, *_: object) -> str:
        return ""

    def train(self, *_: object) -> dict[str, object]:
        assert callable(self.enough) and self.enough() == self.why
        if self.fails:
            raise WorkerGroupError("a rank died of it", {0: RuntimeError("gone")})
        return {"progress": 12, "steps": 2, "left": True}


@pytest.mark.starts
@pytest.mark.parametrize("fails", [False, True])
def test_ranks_that_came_far_enough_are_not_started_again(fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launching, "Group", Leaving)
    monkeypatch.setattr(Leaving, "fails", fails)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node"])
    exporter = Exporter("run", 1, port=0)
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(StringIO()) as display, pytest.raises(Enough, match="another trial is better"):
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, lambda: Leaving.why)


@pytest.mark.starts
def test_a_run_that_came_far_enough_does_not_wait_for_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launching, "wait_for_place", lambda gang, limit, report: report(1.0, "waiting"))
    exporter = Exporter("run", 1, port=0)
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(StringIO()) as display, pytest.raises(Enough, match="far enough"):
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, lambda: "far enough")


class Troubled:
    """Groups of which each fails as it is told, until there is no more trouble; `run.retries` are 3."""

    hang, attempt, why, reason = None, 0, "", ""
    trouble: ClassVar[list[Exception]] = []

    def __init__(self, *_: object):
        """Start nothing."""

    def where(self, *_: object) -> str:
        return ""

    def to_blame(self, *_: object) -> tuple[str, str]:
        return "", ""

    def train(self, *_: object) -> dict[str, object]:
        if self.trouble:
            raise self.trouble.pop()
        return {"progress": 12, "steps": 2, "left": False}


@pytest.mark.starts
@pytest.mark.parametrize(
    ("reason", "error", "times", "over"),
    [
        ("", StorageError("the store is away"), 3, True),
        ("", StorageError("the store is away"), 4, False),
        ("preempted", WorkerGroupError("its machine went", {0: RuntimeError("gone")}), 9, True),
        ("", WorkerGroupError("a rank died", {0: RuntimeError("Connection closed by peer")}), 4, False),
    ],
)
def test_a_store_that_is_away_is_retried_and_a_machine_that_goes_before_its_notice_says_costs_no_retry(
    reason: str, error: Exception, times: int, over: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launching, "Group", Troubled)
    monkeypatch.setattr(Troubled, "reason", reason)
    monkeypatch.setattr(Troubled, "trouble", [error] * times)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node"])
    exporter = Exporter("run", 1, port=0)
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(StringIO()) as display, nullcontext() if over else pytest.raises(StageFailed):
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, pause=lambda _: None)
    assert not Troubled.trouble


@pytest.mark.starts
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (WorkerGroupError("a rank failed", {0: RuntimeError("a shape")}), "user"),
        (WorkerGroupError("a rank failed", {0: RuntimeError("Connection closed by peer")}), "lost"),
        (ControllerError(RuntimeError("Ray's own, of no rank")), "lost"),
    ],
)
def test_the_same_error_three_times_without_progress_needs_a_person(
    error: Exception, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launching, "Group", Troubled)
    monkeypatch.setattr(Troubled, "trouble", [error] * 9)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node"])
    exporter = Exporter("run", 1, port=0)
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(StringIO()) as display, pytest.raises(StageFailed) as failed:
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, pause=lambda _: None)
    assert failed.value.failure.name == name and (failed.value.failure.exit_code == 1) is (name == "user")
    if name == "user":
        assert "the same error 3 times without progress" in str(failed.value) and len(Troubled.trouble) == 6


@pytest.mark.starts
def test_the_first_restart_is_at_once_and_the_next_ones_wait_a_little_longer_each_until_there_is_progress(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slept, waits, furthest = [0.0], list[float](), [0]

    def failing(group: Troubled, *_: object) -> dict[str, object]:
        waits.append(slept[0])
        slept[0] = 0.0
        furthest[0] += len(waits) == 8
        if len(waits) < 12:
            raise StorageError("the store is away")
        return {"progress": 12, "steps": 2, "left": False}

    def pause(seconds: float) -> None:
        slept[0] += seconds

    monkeypatch.setattr(launching, "Group", Troubled)
    monkeypatch.setattr(Troubled, "train", failing)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node"])
    monkeypatch.setattr(launching, "newest_progress", lambda *_: furthest[0])
    exporter, said = Exporter("run", 1, port=0), StringIO()
    job = Job(tiny(tmp_path, tmp_path, "run.retries=9"), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(said) as display:
        launch(job, Gang(1, 1, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, pause=pause)
    assert waits == pytest.approx([0, 0, 2, 5, 10, 10, 10, 10, 0, 2, 5, 10])
    assert "starting the ranks again in 5 s (retries" in said.getvalue()


class Broken:
    """Groups whose ranks fail as long as one is on machine `bad`."""

    hang, attempt, why, reason = None, 0, "", ""
    error: ClassVar[Exception] = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    places: ClassVar[list[list[str]]] = []

    def __init__(self, job: Job, gang: Gang, place: list[str], *_: object):
        self.places.append(place)

    def where(self, *_: object) -> str:
        return "rank 1, host bad"

    def to_blame(self, *_: object) -> tuple[str, str]:
        return "bad", "h2 (10.0.0.2)"

    def train(self, *_: object) -> dict[str, object]:
        if "bad" in self.places[-1]:
            raise WorkerGroupError("a rank failed", {1: self.error})
        return {"progress": 12, "steps": 2, "left": False}


@pytest.mark.starts
@pytest.mark.parametrize(
    ("spares", "error", "places", "over"),
    [
        (1, "CUDA error: uncorrectable ECC error encountered", [["bad", "good"]] * 2 + [["good", "spare"]], True),
        (0, "CUDA error: uncorrectable ECC error encountered", [["bad", "good"]] * 4, False),
        (1, "No space left on device [Errno 28]", [["bad", "good"]] * 2 + [["good", "spare"]], True),
        (1, "the store is away", [["bad", "good"]] * 4, False),
    ],
)
def test_a_machine_that_two_failures_name_gets_no_rank_while_there_is_room_without_it(
    spares: int, error: str, places: list[list[str]], over: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = [Node(name, "", name, {}, {"CPU": 1.0}, {"CPU": 1.0}) for name in ["bad", "good", "spare"][: 2 + spares]]
    monkeypatch.setattr(launching, "Group", Broken)
    monkeypatch.setattr(Broken, "places", [])
    monkeypatch.setattr(Broken, "error", StorageError(error) if "store" in error else RuntimeError(error))
    monkeypatch.setattr(launching, "wait_for_place", lambda gang, *_: fit(gang, there))
    monkeypatch.setattr(launching, "nodes", lambda: there)
    monkeypatch.setattr(placement, "nodes", lambda: there)
    exporter, said = Exporter("run", 1, port=0), StringIO()
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(said) as display, nullcontext() if over else pytest.raises(StageFailed):
        launch(job, Gang(2, 2, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, pause=lambda _: None)
    assert Broken.places == places
    assert ("h2 (10.0.0.2) gets no ranks until" in said.getvalue()) is over


@pytest.mark.starts
def test_a_machine_is_left_out_for_a_time_and_used_where_what_is_free_is_too_little(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    busy = [Node("bad", "", "bad", {}, {"CPU": 2.0}, {"CPU": 2.0}), Node("good", "", "good", {}, {"CPU": 2.0}, {"CPU": 0.0})]

    def wait(gang: Gang, limit: float, *_: object) -> list[str]:
        if not (place := fit(gang, busy)):
            assert limit == launching.SPARE, "without it nobody waits for ever"
            raise NoPlace("none")
        return place

    def heal(group: Broken, *_: object) -> dict[str, object]:
        if len(Broken.places) < 4:
            raise WorkerGroupError("a rank failed", {0: Broken.error})
        return {"progress": 12, "steps": 2, "left": False}

    monkeypatch.setattr(launching, "Group", Broken)
    monkeypatch.setattr(Broken, "places", [])
    monkeypatch.setattr(Broken, "train", heal)
    monkeypatch.setattr(launching, "wait_for_place", wait)
    monkeypatch.setattr(launching, "nodes", lambda: busy)
    monkeypatch.setattr(placement, "nodes", lambda: busy)
    exporter, said = Exporter("run", 1, port=0), StringIO()
    job = Job(tiny(tmp_path, tmp_path), STAGE, open_store(str(tmp_path)), 1, open_store(str(tmp_path)), "")
    with closing(exporter), Display(said) as display:
        launch(job, Gang(1, 2, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None, pause=lambda _: None)
    assert Broken.places == [["bad", "bad"]] * 4 and "gets no ranks until" not in said.getvalue()


class Failing:
    """A group that holds two places and fails, for a reason that is not tried again."""

    hang, attempt, reason = None, 0, ""

    def __init__(self, job: Job, gang: Gang, place: list[str], monitor: StageMonitor, *_: object):
        self.monitor, self.since = monitor, time.time() - 30
        monitor.hold([Berth("host")] * 2, 0.0, self.since, 0.0, 0.0)

    def where(self, *_: object) -> str:
        return "rank 1, host"

    def train(self, notes: str, judge: Callable[[Exception, "Failing"], None]) -> None:
        try:
            judge(ValueError("no such stream"), self)
        finally:  # Ray has the places back
            self.monitor.hold([], 0.0, self.since, 0.0, self.since + 20)


@pytest.mark.starts
def test_what_ends_a_stage_owns_the_time_until_ray_has_the_places_back_and_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launching, "Group", Failing)
    monkeypatch.setattr(launching, "wait_for_place", lambda *_: ["node", "node"])
    exporter, store = Exporter("run", 1, port=0), open_store(str(tmp_path))
    job = Job(tiny(tmp_path, tmp_path), STAGE, store, 1, store, "")
    with closing(exporter), Display(StringIO()) as display, pytest.raises(StageFailed, match="no such stream"):
        launch(job, Gang(2, 2, {"CPU": 1.0}), StageMonitor(STAGE, exporter, display), lambda: None)
    record = exporter.books.record()
    assert record["held"] == [] and [fault["class"] for fault in record["faults"]] == ["user"]
    ((_, state, fault, _, ms),) = [line for line in record["lines"] if line[1] != "waiting"]
    assert (state, fault) == ("recovery", "1.1") and ms == pytest.approx(2 * 20_000, abs=2)
    assert store.read(f"logs/000001.0/{STAGE}-end.txt") == b"user, rank 1, host\nno such stream\n"
