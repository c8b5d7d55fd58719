"""Machines come and go under a run: it waits, goes on with what is there, grows, and ends as if nothing had been."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from io import StringIO
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from ray._raylet import GcsClient
from ray.train import ControllerError, WorkerGroupError

from cluster.driver import launch as launching
from cluster.driver.interruption import SAME, Enough
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
from tests.cluster.support.machines import NODE_TYPE, STAGE, Machines, Running, machines
from tests.tiny import Trained, tiny

SIZE = re.compile(r"ranks: |\d+ of at most ")
"""What is said when ranks were placed."""


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


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """The run of two ranks that nothing disturbs."""
    run = Running(shards, tmp_path_factory.mktemp("undisturbed"), "undisturbed", "workers.count=2")
    assert run.end() == 0, run.said
    return run


@pytest.fixture
def two() -> Iterator[Machines]:
    with machines(2) as there:
        there.wait(2)
        yield there


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.ci
def test_a_machine_lost_without_a_spare_is_waited_for_and_the_weights_are_identical(
    undisturbed: Running, two: Machines, shards: Path, tmp_path: Path
) -> None:
    run = Running(shards, tmp_path, "heal", "workers.count=2", address=two.address)
    run.until(lambda: run.progress >= 480)
    before = sum("waiting since" in line for line in run.lines)
    two.kill()
    run.until_said("waiting since", before + 1)
    waiting = [line for line in run.lines if "waiting since" in line][before:]
    assert "for room for 2 ranks (1 CPU each)" in waiting[0] and run.process.poll() is None
    two.add()
    assert run.end() == 0, run.said
    assert run.weights == undisturbed.weights and run.ledger == undisturbed.ledger
    assert run.attempts > 1, "the ranks were started again"
    lost = [line for line in run.lines if "failed (lost)" in line]
    assert lost and "starting the ranks again (retries without progress: 1 of 3 for lost)" in lost[0], run.said
    after = run.lines[run.lines.index(lost[0]) :]
    after = after[: next(number for number, line in enumerate(after) if line.startswith(f"stage {STAGE}:"))]  # then comes the receipt
    talk = [line for line in after if not line.startswith((f"{STAGE}:", "run "))]
    assert len(talk) <= 10, f"a lost rank is a few lines, not a page: {talk}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dead_board_costs_the_work_since_the_last_checkpoint_and_the_run_goes_on_by_itself(
    undisturbed: Running, two: Machines, shards: Path, tmp_path: Path
) -> None:
    run = Running(shards, tmp_path, "deaf", "workers.count=2", address=two.address)
    run.until(lambda: run.progress >= 480)
    two.kill_process("ray::Board")
    assert run.end() == 0, run.said
    assert run.weights == undisturbed.weights and run.ledger == undisturbed.ledger and run.attempts > 1
    assert "the process through which driver and ranks speak is gone" in run.said and "failed (lost)" in run.said, run.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_board_that_is_stopped_is_said_killed_after_a_minute_and_the_run_goes_on_by_itself(
    two: Machines, shards: Path, tmp_path: Path
) -> None:
    run = Running(shards, tmp_path, "silent", "workers.count=2", "optim.epochs=5000", address=two.address)
    run.until(lambda: run.progress >= 240)
    board = two.process("ray::Board")
    board.suspend()
    run.until_said("the process through which driver and ranks speak has not answered since")
    assert board.status() == psutil.STATUS_STOPPED
    run.until_said("has not answered for 60 s: killing it")
    run.until_said("failed (lost)")
    reached = run.progress
    run.until(lambda: run.progress > reached and run.trained > 0)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.said
    assert run.attempts == 2 and run.status == "STOPPED"


def tell_twice(run: Running) -> None:
    """Ctrl-C, and once more when the first one was heard."""
    run.process.send_signal(signal.SIGINT)
    run.until_said("told to end: a checkpoint at the next step")
    time.sleep(2 * SAME)  # what comes sooner is the first one again
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_told_twice_a_run_ends_at_once_also_where_its_board_is_stopped(two: Machines, shards: Path, tmp_path: Path) -> None:
    run = Running(shards, tmp_path, "deaf-twice", "workers.count=2", "optim.epochs=5000", address=two.address)
    run.until(lambda: run.progress >= 240)
    board = two.process("ray::Board")
    board.suspend()
    run.until_said("the process through which driver and ranks speak has not answered since")
    assert board.status() == psutil.STATUS_STOPPED
    tell_twice(run)
    assert run.status == "STOPPED" and "killing it" not in run.said, "nobody waited until it was given up"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_on_which_a_rank_dies_twice_without_progress_gives_way_to_a_spare_one(shards: Path, tmp_path: Path) -> None:
    with machines(3) as there:
        there.wait(3)
        never = ("optim.epochs=5000", "run.checkpoint_every=1000000", "run.checkpoint_minutes=0")
        run = Running(shards, tmp_path, "broken", "workers.count=2", *never, address=there.address)
        run.until(lambda: run.trained > 0 and run.trains(1))
        bad = run.node_of(1)
        for times in (1, 2):
            run.until(lambda: run.trains(1))
            assert run.node_of(1) == bad
            run.rank(1).kill()
            run.until_said("failed (lost), rank 1", times)
        run.until_said("gets no ranks until")
        run.until(lambda: run.trains(0) and run.trains(1))
        assert bad not in (run.node_of(0), run.node_of(1)), run.said
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130, run.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_waits_for_a_cluster_that_grows(undisturbed: Running, shards: Path, tmp_path: Path) -> None:
    with machines(1) as there:
        run = Running(shards, tmp_path, "grow", "workers.count=2", address=there.address)
        run.until_said("waiting since")
        there.add()
        assert run.end() == 0, run.said
    assert run.weights == undisturbed.weights and "there is room, after" in run.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_that_comes_without_the_shared_folder_is_named_and_writes_nothing(shards: Path, tmp_path: Path) -> None:
    with machines(1) as there:
        there.wait(1)
        run = Running(shards, tmp_path, "blind", "workers.count=2", address=there.address)
        run.until_said("waiting since")
        there.add(blind=tmp_path)
        assert run.end() == 1, run.said
    assert "(refused)" in run.said and "on that machine the folder is another one" in run.said, run.said
    assert run.status == "FAILED" and not run.progress


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_autoscaler_is_asked_for_machines_and_more_than_it_may_start_is_refused_with_the_numbers(
    undisturbed: Running, shards: Path, tmp_path: Path
) -> None:
    with machines(0, most=2) as there:
        run = Running(shards, tmp_path, "scaled", "workers.count=2", address=there.address)
        assert run.end() == 0, run.said
        assert run.weights == undisturbed.weights and f"Adding 2 node(s) of type {NODE_TYPE}" in run.said
        for size, room in ((["workers.count=3"], 2), (["workers.count=1", "workers.cpus=2"], 0)):
            refused = Running(shards, tmp_path, f"of{room}", *size, address=there.address)
            assert refused.end() == 1, refused.said
            assert f"find room for {room} on all machines that this cluster and its autoscaler may ever have" in refused.said
            assert f"2 {NODE_TYPE} with 1 CPU)" in refused.said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wait_that_was_limited_ends_with_75(shards: Path, tmp_path: Path) -> None:
    with machines(1) as there:
        run = Running(shards, tmp_path, "late", "workers.count=2", "run.wait_minutes=0.2", address=there.address)
        assert run.end() == 75, run.said
    assert "given up after 0.2 minutes (run.wait_minutes)" in run.said and run.status == "FAILED"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_number_of_ranks_follows_the_machines_and_every_step_has_its_items(shards: Path, tmp_path: Path) -> None:
    """4 -> 1 -> 3 -> 2 ranks by itself."""
    length = ("optim.epochs=100", "run.checkpoint_every=120")
    whole = Running(shards, tmp_path, "whole", "workers.count=1", *length)
    assert whole.end() == 0, whole.said
    with machines(4) as there:
        there.wait(4)
        run = Running(shards, tmp_path, "elastic", "workers.count=[1,4]", *length, address=there.address)

        def trained_by(ranks: int) -> None:
            """So many ranks were started last, and have written a checkpoint of their own."""
            said = re.compile(rf"ranks: .* {ranks - 1}" if ranks > 1 else "1 of at most 4 ranks; .*")
            run.until(lambda: said.fullmatch(next((line for line in reversed(run.lines) if SIZE.match(line)), "")))
            reached = run.progress
            run.until(lambda: run.progress > reached)

        trained_by(4)
        for _ in range(3):
            there.kill()
        trained_by(1)
        few = set(metrics_of(run))
        there.add(2)
        trained_by(3)
        grown = metrics_of(run)
        there.kill()
        trained_by(2)
        assert run.end() == 0, run.said
    assert len(run.ledger) == 667 and run.ledger == whole.ledger
    new = sorted(grown.keys() - few)
    assert 1 <= len(new) <= 2, "one start of workers for each machine that came, or for both"
    steps = [progress for attempt in (max(few), *new) for progress in grown[attempt]]
    assert len(steps) == len(set(steps)), "the checkpoint at which they grew is where they went on"


def metrics_of(run: Running) -> dict[str, list[int]]:
    """Attempt -> progress after each step that it has kept so far."""
    found: dict[str, list[int]] = {}
    for entry in run.store.list("metrics/"):
        rows = [json.loads(line) for line in run.store.read(entry.key).decode().splitlines()]
        found.setdefault(entry.key.split("/")[1], []).extend(row["progress"] for row in rows)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_notice_costs_no_step_on_whichever_node_it_comes(undisturbed: Running, shards: Path, tmp_path: Path) -> None:
    with machines(4) as there:
        never = ("run.checkpoint_every=100000", "run.checkpoint_minutes=0")
        run = Running(shards, tmp_path, "notice", "workers.count=2", *never, address=there.address)
        for rank in (0, 1):
            run.until_said("ranks: ", times=rank + 1)  # those that had the first notice have left
            before = run.trained
            run.until(lambda before=before: run.trained > before)
            there.drain(run.node_of(rank), 600)
            run.until_said("will be taken away", times=rank + 1)
        assert run.end() == 0, run.said
    rows = [json.loads(line) for entry in run.store.list("metrics/") for line in run.store.read(entry.key).decode().splitlines()]
    assert len(rows) == len({row["progress"] for row in rows}) == 160, "no step was done twice"
    assert run.attempts == 3 and run.weights == undisturbed.weights


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_end_a_run_leaves_a_checkpoint_of_the_step_it_was_in(
    number: signal.Signals, code: int, undisturbed: Running, shards: Path, tmp_path: Path
) -> None:
    command = (shards, tmp_path, "told", "workers.count=2", "run.checkpoint_every=100000", "run.checkpoint_minutes=0")
    run = Running(*command)
    run.until(lambda: run.trained > 0)
    run.process.send_signal(number)
    assert run.end() == code, run.said
    assert run.status == "STOPPED" and run.progress > 0 and f"checkpoint at {run.progress} items" in run.said
    again = Running(*command)
    assert again.end() == 0, again.said
    rows = [json.loads(line) for entry in run.store.list("metrics/") for line in run.store.read(entry.key).decode().splitlines()]
    assert len(rows) == len({row["progress"] for row in rows}) == 160, "no step was done twice"
    assert again.weights == undisturbed.weights


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_told_twice_a_run_ends_at_once_whatever_a_rank_is_at(shards: Path, tmp_path: Path) -> None:
    run = Running(shards, tmp_path, "twice", "workers.count=2")
    run.until(lambda: run.progress >= 240)
    run.rank(0).suspend()  # it will make no checkpoint
    tell_twice(run)
    assert run.status == "STOPPED" and "writing the stacks" not in run.said, "nobody waited until it was taken for one that hangs"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_go_to_machines_of_their_labels_and_wait_for_one_with_them(shards: Path, tmp_path: Path) -> None:
    with machines(2) as there:
        run = Running(shards, tmp_path, "labels", "workers.count=1", "workers.labels={kind: large}", address=there.address)
        run.until_said("waiting since")
        there.add(labels="kind=large")
        run.until(lambda: run.trains(0))
        node = run.node_of(0)
        assert run.end() == 0, run.said
        (large,) = [info for info in GcsClient(there.address).get_all_node_info().values() if info.labels.get("kind") == "large"]
    assert large.node_id.hex() == node


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_that_dies_while_it_loads_leaves_its_place_free(undisturbed: Running, shards: Path, tmp_path: Path) -> None:
    """A private Ray has no other place."""
    run = Running(shards, tmp_path, "loading", "workers.count=2")

    def ranks() -> set[int]:
        found = set()
        for one in psutil.Process(run.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it lives for a moment only
                found |= {one.pid} if one.name().startswith("ray::RayTrain") else set()
        return found

    run.until(lambda: run.progress >= 240)
    before = ranks()
    run.rank(0).kill()
    run.until(lambda: len(ranks() - before) == 2)
    os.kill(min(ranks() - before), signal.SIGKILL)
    assert run.end() == 0, run.said
    assert sum(line.startswith("stage autoencoder failed (lost)") for line in run.lines) == 2, run.said
    assert not any("Traceback" in line for line in run.lines), run.said
    assert run.weights == undisturbed.weights and run.ledger == undisturbed.ledger
