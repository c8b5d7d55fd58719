"""Checkpoints: what is kept, what is deleted."""

import torch

from cluster import checkpoint
from cluster.checkpoint import Writer
from cluster.engine import Fragment
from cluster.storage import Store


def test_an_unreadable_manifest_does_not_stop_the_next_checkpoint(store: Store) -> None:
    store.put("checkpoints/autoencoder/000000000000005-000001.json", b"{half")
    writer = Writer(store, lambda value: [value], rank=0, keep=2, superseded=lambda: None)
    facts = {"stage": "autoencoder", "progress": 9, "steps": 3, "life": 1, "dataset": "", "config": {}}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.ones(2)})], {}, **facts)
    writer.commit()
    newest = checkpoint.read_manifest(store, checkpoint.listing(store, "autoencoder")[0])
    assert newest.progress == 9
    assert checkpoint.assemble(store, newest, "master")["w"].tolist() == [1, 1]
