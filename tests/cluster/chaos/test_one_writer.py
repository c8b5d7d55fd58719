"""Real processes at one run's folder that are stopped, cut off and killed, with clocks an hour off.

tests/cluster/runs/test_lineage.py has the interleavings in one process.
"""

import json
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import sleep

import pytest

from cluster.runs import checkpoint
from cluster.runs.state import Attempt, read_state
from cluster.storage.folder import FolderStore
from tests.cluster.support.writer import CUT, MEND, STEP
from tests.tiny import ROOT

pytestmark = pytest.mark.slow

BACK = {signal.SIGSTOP: signal.SIGCONT, CUT: MEND}
OFF = ("-3600", "0", "3600")
"""Seconds by which the clock of a process is wrong."""


class Writers:
    """Real processes at one run's folder, which a seeded script stops, cuts off from it, lets come back, and kills.

    Args:
        folder: for the run and for their logs.
        seed: of what befalls them, and when: at points of their own work.
    """

    def __init__(self, folder: Path, seed: int):
        self.run, self.random, self._folder = FolderStore(folder / "run"), random.Random(seed), folder
        self.happened: list[str] = []
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        log = self._folder / f"{len(self.all)}.log"
        given = [str(self.run.url), str(log), str(60 * STEP), self.random.choice(OFF)]
        command = [sys.executable, "-m", "tests.cluster.support.writer", *given]
        self.all.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
        return self.all[-1]

    def until(self, process: subprocess.Popen[bytes], manifests: int) -> bool:
        """Wait until a process has created so many manifests, or has ended; returns whether it lives."""
        log = self._folder / f"{self.all.index(process)}.log"
        while process.poll() is None:
            if log.exists() and log.read_text().count('"create", "checkpoints/') >= manifests:
                return True
            sleep(0.005)
        return False

    def log(self) -> list[tuple[float, Attempt, str, str]]:
        """All their writes, in order."""
        lines = [json.loads(line) for path in self._folder.glob("*.log") for line in path.read_text().splitlines()]
        return sorted((at, Attempt(*by), operation, key) for at, by, operation, key in lines)


@pytest.mark.parametrize("seed", range(10))
def test_real_processes_that_are_stopped_cut_off_and_killed_leave_nothing_of_an_older_life(seed: int, tmp_path: Path) -> None:
    writers = Writers(tmp_path, seed)
    away = {}
    for _ in range(3):
        one = writers.start()
        if not writers.until(one, writers.random.randrange(1, 8)):
            continue
        sign = writers.random.choice((signal.SIGSTOP, CUT, signal.SIGKILL))
        one.send_signal(sign)
        writers.happened.append(sign.name)
        if sign != signal.SIGKILL:
            away[one] = BACK[sign]
    last = writers.start()
    assert writers.until(last, 1), "it took the lease of those that are away"
    for one, sign in away.items():
        one.send_signal(sign)
    codes = [one.wait(60) for one in writers.all]
    assert writers.happened and last.returncode == 0, codes
    assert all(one.returncode == 1 for one in away), f"each found out that it was over: {codes}"
    begun: dict[Attempt, float] = {}
    for at, by, operation, key in writers.log():
        if key.startswith("lineage/") and operation == "create":
            begun[by] = at
    kept = checkpoint.list_checkpoints(writers.run, "autoencoder")
    newest = max(begun)
    late = [key for at, by, operation, key in writers.log() if operation == "create" and at > begun[newest] and by < newest]
    assert not set(late) & set(kept), "what an older life created after the newest one had begun is in no reader's list"
    state = read_state(writers.run)
    assert state and (state.status, state.life) == ("DONE", newest.life)
    assert [
        checkpoint.assemble(writers.run, one, "master")["w"][0] for one in map(partial(checkpoint.read_manifest, writers.run), kept)
    ] == [360, 354]
