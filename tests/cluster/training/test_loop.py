"""The loop: the same order for every placement, identical weights after any kill, and whole checkpoints or none."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cluster.runs import checkpoint
from cluster.storage import open_store
from cluster.training.loop import NonFinite
from tests.cluster.support.ranks import on_ranks, start_ranks
from tests.cluster.support.training import parts, train_here, train_on
from tests.tiny import tiny

TOLERANCE = 1e-5
"""Design's word for the first 20 steps from a common state at lr <= 1e-4 without dropout."""


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 13 steps on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_on(1, tiny(shards, folder, "optim.epochs=2", "workers.zero=0"), folder)
    return folder


def rows_of(folder: Path) -> list[dict]:
    from cluster.telemetry.metrics_log import read_rows

    return read_rows(open_store(str(folder)), "autoencoder")


@pytest.mark.parametrize(("ranks", "zero", "micro_batch"), [(2, 1, 2), (3, 3, 0), (2, 2, 0), pytest.param(3, 0, 1, marks=pytest.mark.slow)])
def test_any_ranks_and_zero_stage_use_the_same_items_and_give_the_same_losses(
    undisturbed: Path, shards: Path, tmp_path: Path, ranks: int, zero: int, micro_batch: int
) -> None:
    experiment = tiny(shards, tmp_path, "optim.epochs=2", f"workers.zero={zero}", f"workers.micro_batch={micro_batch}")
    rows, expected = train_on(ranks, experiment, tmp_path), rows_of(undisturbed)
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected] and len(rows) == 14
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=TOLERANCE)


def test_every_item_is_consumed_exactly_once_per_epoch(undisturbed: Path, shards: Path) -> None:
    """The ledger is a sum of checksums, so the steps of both epochs add up to twice the sum over all items."""
    from cluster.data.manifest import load_manifest
    from cluster.data.reader import Reader
    from reactdiff.stage import Source, stage
    from tests.tiny import tiny

    store = open_store(str(shards))
    manifest, experiment = load_manifest(store), tiny(shards, undisturbed)
    reader = Reader(store, manifest, "train")
    kind = stage("autoencoder", experiment.model, experiment.diffusion, Source(manifest.stream_specs, manifest.frames))
    once = sum(reader.read(clip, sorted(set(kind.reads(side).values()))).checksum for clip in range(reader.clips) for side in (0, 1))
    assert sum(row["ledger"] for row in rows_of(undisturbed)) == 2 * once


def test_saved_on_three_ranks_with_zero_3_goes_on_on_one_rank_with_zero_1(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    first = tiny(shards, tmp_path, "optim.epochs=0.9", "workers.zero=3")
    train_on(3, first, tmp_path)
    then = tiny(shards, tmp_path, "optim.epochs=2", "workers.zero=1")
    rows, expected = train_on(1, then, tmp_path, life=2), rows_of(undisturbed)
    assert {row["life"] for row in rows} == {1, 2}
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=TOLERANCE)


def from_the_first_checkpoint(folder: str, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Losses of this process are what `loss_of` makes of them as soon as there is a checkpoint; grows by one at every step."""
    from cluster.training import loop as worker

    original, store, steps = worker.Engine.forward, open_store(folder), []

    def forward(self, batch, valid):
        loss = original(self, batch, valid)
        steps.append(len(steps))
        return loss_of(loss) if checkpoint.list_checkpoints(store, "autoencoder") else loss

    worker.Engine.forward = forward
    return steps


def murdered(rank: int, ranks: int, experiment, folder: str) -> None:
    """Train; rank 1 gets a SIGKILL in the step after the first checkpoint."""
    if rank == 1:
        from_the_first_checkpoint(folder, lambda loss: os.kill(os.getpid(), signal.SIGKILL))
    train_here(rank, ranks, experiment, folder, 1, "autoencoder")


def test_killed_with_sigkill_and_started_again_the_final_weights_are_identical(shards: Path, tmp_path: Path) -> None:
    settings = ("optim.epochs=6", "run.checkpoint_every=18", "workers.zero=2", "run.keep=9")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_on(2, tiny(shards, whole, *settings), whole)
    group = start_ranks(2, murdered, tiny(shards, killed, *settings), str(killed))
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        while not group.join():
            pass
    assert group.processes[1].exitcode == -signal.SIGKILL
    store = open_store(str(killed))
    at_the_kill = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert 0 < at_the_kill.progress < 240, "the kill came in the middle"
    train_on(2, tiny(shards, killed, *settings), killed, life=2)
    assert parts(killed) == parts(whole)


def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_run_ends_the_same(shards: Path, tmp_path: Path) -> None:
    settings = ("run.checkpoint_every=12", "run.keep=9")
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    train_on(1, tiny(shards, damaged, "optim.epochs=0.9", *settings), damaged)
    store = open_store(str(damaged))
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    victim = damaged / "checkpoints/autoencoder" / newest.parts[0].file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train_on(1, tiny(shards, damaged, "optim.epochs=1", *settings), damaged, life=2)
    assert "CHECKPOINT DAMAGED, falling back" in (tmp_path / "damaged.log").read_text()
    train_on(1, tiny(shards, whole, "optim.epochs=1", *settings), whole)
    assert parts(damaged) == parts(whole)


def test_a_longer_end_goes_on_as_if_it_had_been_longer_from_the_start(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """40 items are not whole batches of 6: the last step of the short run is not one of the long run."""
    train_on(1, tiny(shards, tmp_path, "optim.epochs=1", "workers.zero=0"), tmp_path)
    train_on(1, tiny(shards, tmp_path, "optim.epochs=2", "workers.zero=0"), tmp_path, life=2)
    assert parts(tmp_path) == parts(undisturbed)


def poisoned(rank: int, ranks: int, experiment, folder: str) -> tuple[str, int]:
    """What is said, and the last step, of training with a loss that becomes NaN on rank 0 after the first checkpoint."""
    steps = from_the_first_checkpoint(folder, lambda loss: loss * (1 if rank else torch.nan))
    try:
        train_here(rank, ranks, experiment, folder, 1, "autoencoder")
    except NonFinite as error:
        return str(error), steps[-1]
    return "finished", steps[-1]


def test_a_loss_that_is_no_number_stops_all_ranks_before_the_update_and_names_the_items(shards: Path, tmp_path: Path) -> None:
    said = on_ranks(2, poisoned, tiny(shards, tmp_path, "run.checkpoint_every=6", "optim.epochs=6"), str(tmp_path))
    (text, step), store = said[0], open_store(str(tmp_path))
    assert said[0] == said[1] and f"the loss of step {step} of stage autoencoder is nan; its items are [" in text
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert 0 < newest.steps <= step < 40


def test_a_checkpoint_without_its_manifest_does_not_exist(undisturbed: Path) -> None:
    store = open_store(str(undisturbed))
    names = checkpoint.list_checkpoints(store, "autoencoder")
    facts = json.loads(store.read(names[0]))
    assert facts["progress"] == 80 and facts["quarantine"] == [] and facts["config"]["model.hidden"] == 32
    assert all(name.endswith(".json") for name in names)
