"""Ranks that hang, in each way five times in one run: named, their stacks kept, and the weights are those of the undisturbed run."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.driver.watchdog import LEAST
from tests.cluster.support.machines import LIMIT, STAGE, Running
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HANGS = 5
NICENESS = 15
"""Of the processes that Ray starts."""
LONG = ("workers.count=2", "optim.epochs=50")
SAID = re.compile(
    r"no (sign of life for more than (?P<silent>\d+) s|step for (?P<stood>\d+) s, limit (?P<limit>\d+) s)"
    r".*rank (?P<rank>\d) on \S+ \(\S+\) in phase (?P<phase>\w+) of its step \d+ for (?P<there>\d+) s"
)

LATE = 5
"""Seconds by which a busy machine may make the driver's looks late."""


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    run = Running(shards, tmp_path_factory.mktemp("undisturbed"), "undisturbed", *LONG)
    assert run.end() == 0, run.said
    return run


def named(run: Running) -> list[re.Match[str]]:
    """The lines that name a rank and say that its stacks are written."""
    return [found for line in run.lines if "writing the stacks" in line and (found := SAID.search(line))]


def hang(run: Running, cause: Callable[[int], Callable[[], bool]]) -> list[tuple[int, float]]:
    """Let a rank hang, five times, each when the ranks are under way again; which, and the seconds until it was named."""
    happened = []
    for number in range(HANGS):
        chance = random.Random(number)
        reached = run.progress
        run.until(lambda reached=reached: run.progress > reached)
        time.sleep(chance.random())
        rank = chance.randrange(2)
        came = cause(rank)
        run.until(came)
        began = time.monotonic()
        run.until(lambda number=number: len(named(run)) > number)
        happened.append((rank, time.monotonic() - began))
    return happened


def assert_told(run: Running, undisturbed: Running, happened: list[tuple[int, float]], phase: str) -> None:
    """Each was the rank that was named, in time and in this phase; a failure of the class `hang`, with all stacks; and the run went on."""
    assert run.end() == 0, run.said
    print("named after " + ", ".join(f"{seconds:.1f} s" for _, seconds in happened))
    assert [int(one["rank"]) for one in named(run)] == [rank for rank, _ in happened], run.said
    assert all(re.fullmatch(phase, one["phase"]) for one in named(run)), run.said
    for one in named(run):
        stood, limit = (one["stood"], one["limit"]) if one["limit"] else (one["there"], one["silent"])
        assert int(limit) >= LEAST and int(stood) <= int(limit) + LATE, one[0]
    assert sum("failed (hang)" in line and "starting the ranks again" in line for line in run.lines) == HANGS
    kept = [path.name for path in run.folder.glob("logs/*/*stacks*")]
    assert sorted(kept) == sorted([f"{STAGE}-stacks-0.txt", f"{STAGE}-stacks-1.txt"] * HANGS)
    assert run.weights == undisturbed.weights and run.ledger == undisturbed.ledger


def test_ranks_that_are_stopped(undisturbed: Running, shards: Path, tmp_path: Path) -> None:
    run = Running(shards, tmp_path, "stopped", *LONG)

    def stop(rank: int) -> Callable[[], bool]:
        victim = run.rank(rank)
        victim.suspend()
        return lambda: victim.status() == "stopped"

    assert_told(run, undisturbed, hang(run, stop), r"\w+")
    assert sum("is stopped" in path.read_text() for path in run.folder.glob("logs/*/*stacks*")) == HANGS, "what cannot speak is looked at"


@pytest.mark.parametrize(("what", "phase"), [("lock", "backward"), ("skip", r"\w+")])
def test_ranks_that_wait_for_a_lock_or_leave_out_a_collective(
    what: str, phase: str, undisturbed: Running, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGING", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests/cluster/support/hanging"), str(ROOT)]))
    run = Running(shards, tmp_path, what, *LONG)

    def order(rank: int) -> Callable[[], bool]:
        (tmp_path / f"{what}-{rank}.happened").unlink(missing_ok=True)
        (tmp_path / f"{what}-{rank}").touch()
        return lambda: (tmp_path / f"{what}-{rank}.happened").exists()

    assert_told(run, undisturbed, hang(run, order), phase)


@pytest.mark.alone
def test_ten_runs_on_a_busy_machine_raise_no_alarm(shards: Path, tmp_path: Path) -> None:
    """Five runs of two ranks at a time, beside so many processes that each core has five more to serve.

    Those are as nice as Ray's own: beside others ranks would stand still.
    """
    command = ["nice", "-n", str(NICENESS), sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(5 * len(os.sched_getaffinity(0)))]
    try:
        for first in (0, 5):
            runs = [Running(shards, tmp_path, f"busy-{first + number}", "workers.count=2", "optim.epochs=10") for number in range(5)]
            for run in runs:
                run.process.wait(LIMIT)
            for run in runs:  # what is left behind is asked for when none of them lives
                assert run.end() == 0, run.said
                assert "writing the stacks" not in run.said and "starting the ranks again" not in run.said, run.said
    finally:
        for process in busy:
            process.kill()
            process.wait()
