"""Objects with a hash: what changed on its way is read once more, what was changed is refused."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cluster.data.manifest import load_manifest
from cluster.data.shards import read_index
from cluster.runs import checkpoint
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention
from cluster.storage import Store, content_hash, open_store
from cluster.storage.hashing import HashMismatch, read_verified
from cluster.training.engine import Fragment
from infra.objectstore import ObjectStore
from tests.cluster.support.faulty import faulty_proxy
from tests.cluster.support.streaming import make_latents

CONTENT = b"what was written"


def test_content_is_that_of_the_hash_or_refused(store: Store) -> None:
    store.put("a/b", CONTENT)
    assert read_verified(store, "a/b", content_hash(CONTENT)) == CONTENT
    store.put("a/b", b"something else")
    with pytest.raises(HashMismatch, match=f"{store.url}/a/b has hash {content_hash(b'something else')}") as caught:
        read_verified(store, "a/b", content_hash(CONTENT))
    assert caught.value.actual == content_hash(b"something else")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def index_of(store: Store) -> np.ndarray:
    manifest = load_manifest(store)
    return read_index(store, manifest.shard("train", 0), manifest.split("train").shards.info(0).index)


def weights_of(store: Store) -> list[float]:
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    return checkpoint.assemble(store, newest, "master")["w"].tolist()


@pytest.mark.parametrize(
    ("aim", "read"),
    [(r"GET \S+\.index\.npy", index_of), (r"GET \S+/manifest-", load_manifest), (r"GET \S+/parts/", weights_of)],
    ids=["index", "manifest", "checkpoint"],
)
def test_bytes_that_changed_on_their_way_are_read_once_more(
    aim: str, read: Callable[[Store], object], object_store: ObjectStore, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    make_latents(store, [3])
    writer = CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(1), superseded=lambda: None)
    facts = {"stage": "autoencoder", "progress": 1, "steps": 1, "life": 1, "dataset": "", "config": {}}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.ones(2)})], {}, **facts)
    writer.commit()
    undisturbed = read(store)
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.arm(["flip"], aim)
        assert np.array_equal(read(open_store(s3_url)), undisturbed)
        assert proxy.happened == ["flip"]
