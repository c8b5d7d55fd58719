"""Two trainings fill one cache at the same time, and one of them is killed over it: nobody has to clean up, and nobody notices."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from cluster.data.cache import HEAD
from cluster.storage import open_store
from cluster.telemetry.metrics_log import read_rows
from tests.cluster.support.ranks import start_ranks
from tests.cluster.support.training import parts, train_here, train_on
from tests.tiny import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

END = ("optim.epochs=6", "data.read_ahead=1")


def filled(cache: Path) -> bool:
    """Whether bytes of a shard are there."""
    return any(path.stat().st_size > HEAD for path in cache.glob("*") if path.is_file())


def ledger(run: Path) -> list[float]:
    return [row["ledger"] for row in read_rows(open_store(str(run)), "autoencoder")]


@pytest.mark.parametrize("megabytes", [1, 1000])
def test_a_training_that_shares_its_cache_with_one_that_is_killed(shards: Path, tmp_path: Path, megabytes: int) -> None:
    cache, whole, victim, other = (tmp_path / name for name in ("cache", "whole", "victim", "other"))
    settings = (*END, f"data.cache={cache}", f"data.cache_limit={megabytes / 1000}")
    train_on(1, tiny(shards, whole, *END), whole)
    killed = start_ranks(2, train_here, tiny(shards, victim, *settings), str(victim), 1, "autoencoder")
    beside = start_ranks(1, train_here, tiny(shards, other, *settings), str(other), 1, "autoencoder")
    while not filled(cache):
        assert killed.processes[1].is_alive()
        time.sleep(0.001)
    os.kill(killed.processes[1].pid, signal.SIGKILL)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        while not killed.join():
            pass
    assert len(ledger(victim)) < 40, "the kill came in the middle"
    while not beside.join():
        pass
    assert ledger(other) == ledger(whole) and len(ledger(whole)) == 40
    assert parts(other) == parts(whole)
    train_on(2, tiny(shards, victim, *settings), victim, life=2)
    assert ledger(victim) == ledger(whole)
    assert sum(path.stat().st_blocks * 512 for path in cache.rglob("*")) <= megabytes * 10**6
