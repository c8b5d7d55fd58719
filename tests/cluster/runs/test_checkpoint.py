"""Checkpoints: what is kept, what is deleted."""

import pytest
import torch

from cluster.runs import checkpoint
from cluster.runs.checkpoint import CheckpointWriter, DamagedCheckpoint
from cluster.runs.state import Attempt
from cluster.storage import Store
from cluster.training.engine import Fragment


def test_an_unreadable_manifest_does_not_stop_the_next_checkpoint(store: Store) -> None:
    store.put("checkpoints/autoencoder/000000000000005-000001.json", b"{half")
    writer = CheckpointWriter(store, lambda value: [value], rank=0, keep=2, superseded=lambda: None)
    facts = {"stage": "autoencoder", "progress": 9, "steps": 3, "life": 1, "dataset": "", "config": {}}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.ones(2)})], {}, **facts)
    writer.commit()
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert newest.progress == 9
    assert checkpoint.assemble(store, newest, "master")["w"].tolist() == [1, 1]


def commit(writer: CheckpointWriter, progress: int) -> None:
    facts = {"stage": "autoencoder", "progress": progress, "steps": progress, "life": 1, "dataset": "", "config": {}}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.full((2,), float(progress))})], {}, **facts)
    writer.commit()


def parts(store: Store) -> set[str]:
    return {entry.key for entry in store.list("checkpoints/autoencoder/parts/")}


def test_a_part_of_the_next_checkpoint_that_another_rank_has_uploaded_already_outlives_the_commit_of_this_one(store: Store) -> None:
    writer, early = (
        CheckpointWriter(store, lambda value: [value], rank=0, keep=1, superseded=lambda: None),
        "checkpoints/autoencoder/parts/next.safetensors",
    )
    commit(writer, 1)
    first = parts(store)
    store.put(early, b"of rank 1")
    commit(writer, 2)
    assert early in parts(store) and not first & parts(store), "the old checkpoint is gone, the coming one is not"


def test_what_a_life_that_died_left_behind_goes_when_the_next_begins(store: Store) -> None:
    writer, orphan = (
        CheckpointWriter(store, lambda value: [value], rank=0, keep=2, superseded=lambda: None),
        "checkpoints/autoencoder/parts/orphan.safetensors",
    )
    for progress in (1, 2):
        commit(writer, progress)
    named = parts(store)
    store.put(orphan, b"of a rank that was killed")
    checkpoint.remove_orphans(store, "autoencoder", Attempt(2, 0))
    assert parts(store) == named and len(named) == 2


def test_a_checkpoint_that_goes_between_listing_and_reading_is_no_checkpoint(store: Store) -> None:
    commit(CheckpointWriter(store, lambda value: [value], rank=0, keep=2, superseded=lambda: None), 1)
    (listed,) = checkpoint.list_checkpoints(store, "autoencoder")
    store.delete(listed)
    with pytest.raises(DamagedCheckpoint, match=f"{store.url}/{listed} is gone"):
        checkpoint.read_manifest(store, listed)


def test_nothing_is_swept_while_a_manifest_cannot_be_read(store: Store) -> None:
    writer = CheckpointWriter(store, lambda value: [value], rank=0, keep=2, superseded=lambda: None)
    commit(writer, 1)
    store.put("checkpoints/autoencoder/000000000000009-000001.json", b'{"version": 99}')
    store.put("checkpoints/autoencoder/parts/of-a-later-version.safetensors", b"whose manifest this program cannot read")
    before = parts(store)
    checkpoint.remove_orphans(store, "autoencoder", Attempt(2, 0))
    assert parts(store) == before
