"""A notice, Ctrl-C and SIGTERM: a checkpoint of the step that the run is in; and told twice it waits for nobody."""

import json
import signal
import time
from pathlib import Path

import pytest

from cluster.driver.interruption import SAME
from tests.cluster.support.machines import Machines, Running, machines, stop_board


def assert_each_step_was_done_once(run: Running) -> None:
    """Its attempts together have a row for each of its 160 steps, and no second one."""
    rows = [json.loads(line) for entry in run.store.list("metrics/") for line in run.store.read(entry.key).decode().splitlines()]
    assert len(rows) == len({row["progress"] for row in rows}) == 160, "no step was done twice"


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
    assert_each_step_was_done_once(run)
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
    assert_each_step_was_done_once(run)
    assert again.weights == undisturbed.weights


def tell_twice(run: Running) -> None:
    """Ctrl-C, and once more when the first one was heard."""
    run.process.send_signal(signal.SIGINT)
    run.until_said("told to end: a checkpoint at the next step")
    time.sleep(2 * SAME)  # what comes sooner is the first one again
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.said


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
def test_told_twice_a_run_ends_at_once_also_where_its_board_is_stopped(two: Machines, shards: Path, tmp_path: Path) -> None:
    run = Running(shards, tmp_path, "deaf-twice", "workers.count=2", "optim.epochs=5000", address=two.address)
    stop_board(run, two)
    tell_twice(run)
    assert run.status == "STOPPED" and "killing it" not in run.said, "nobody waited until it was given up"
