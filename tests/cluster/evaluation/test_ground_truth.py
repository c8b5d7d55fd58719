"""What is scored is read several clips at a time: each read waits for the network."""

from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.data.manifest import File, Manifest
from cluster.data.reader import Reader
from cluster.data.shards import encode_npy
from cluster.evaluation.evaluate import _mean_attributes
from cluster.evaluation.ground_truth import GroundTruth
from cluster.storage import Store, content_hash, open_store
from reactdiff.clip import PERSONS
from reactdiff.metrics.partial import PER_CLIP
from tests.cluster.support.streaming import FRAMES, make_clips

CLIPS = 6


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Store, Manifest]:
    """A split in which only its own reaction suits a speaker."""
    store = open_store(str(tmp_path))
    manifest, matrix = make_clips(store, [CLIPS]), encode_npy(np.eye(2 * CLIPS, dtype=bool))
    store.put("matrix.npy", matrix)
    split = manifest.splits["train"].model_copy(update={"appropriateness": File(file="matrix.npy", hash=content_hash(matrix))})
    return store, manifest.model_copy(update={"splits": {"train": split}})


def read_in_pairs(patch: pytest.MonkeyPatch) -> None:
    """From now on a read comes back only when another one has begun."""
    read, pair = Reader.read, Barrier(2, timeout=60)

    def paired(reader: Reader, clip: int, wanted: Any) -> Any:
        pair.wait()
        return read(reader, clip, wanted)

    patch.setattr(Reader, "read", paired)


def test_real_reactions_are_read_together(clips: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    truth = GroundTruth(*clips, "train", CLIPS)
    predictions = np.stack([truth.listener(item)[None] for item in (0, 7)])
    read_in_pairs(monkeypatch)
    part = truth.score([0, 7], predictions)
    assert part.values[:, PER_CLIP.index("FRDist")].tolist() == [0, 0] and part.real.frames == 2 * FRAMES


def test_the_mean_reaction_is_that_of_clips_that_are_read_together(
    clips: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest = clips
    reader, wanted = Reader(store, manifest, "train"), [(person, "attributes") for person in PERSONS]
    mean = np.mean([np.mean(list(reader.read(clip, wanted).arrays.values()), axis=(0, 1)) for clip in range(CLIPS)], axis=0)
    read_in_pairs(monkeypatch)
    latents: Any = SimpleNamespace(dataset=store, clips=manifest, split="train", on_corrupt="stop")
    assert _mean_attributes(latents) == tuple(mean.tolist())
