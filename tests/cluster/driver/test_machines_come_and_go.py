"""Machines and processes go under a run, and come: it waits, goes on with what is there, grows, and ends as if nothing had been."""

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._raylet import GcsClient

from tests.cluster.support.machines import NODE_TYPE, STAGE, Machines, Running, machines, stop_board

SIZE = re.compile(r"ranks: |\d+ of at most ")
"""What is said when ranks were placed."""


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
    stop_board(run, two)
    run.until_said("has not answered for 60 s: killing it")
    run.until_said("failed (lost)")
    reached = run.progress
    run.until(lambda: run.progress > reached and run.trained > 0)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.said
    assert run.attempts == 2 and run.status == "STOPPED"


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
