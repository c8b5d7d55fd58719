"""Latents that two build at the same time, and those of a time when names carried no hashes, on both kinds of store."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, Condition
from types import SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch

from cluster.config.schema import Workers
from cluster.data.manifest import CURRENT, Manifest, load_manifest
from cluster.data.reader import Reader
from cluster.data.shards import decode_npy, encode_npy
from cluster.data.verify import check_shard
from cluster.runs import build_latents as building
from cluster.runs import latents as encoding
from cluster.runs.build_latents import build_latents
from cluster.runs.latents import MOMENTS, LatentDataset, encode_shard, read_moments, read_range
from cluster.storage import Store, content_hash
from reactdiff.clip import PERSONS
from reactdiff.stage import LATENT
from tests.cluster.support.streaming import FRAMES, make_clips

WIDTH = 4


class Dataset(LatentDataset):
    """Latents of an autoencoder that needs no training."""

    @property
    def parts(self) -> dict[str, int]:
        return self.__dict__.get("others", {LATENT: WIDTH})


class Codec:
    """Means of what it reads, on a device whose last bits are its own.

    Args:
        error: of this device.
        meet: called at each clip.
    """

    inputs, device = ("mfcc",), "cpu"

    def __init__(self, error: float = 0.0, meet: Callable[[], Any] = lambda: None):
        self._error, self._meet = error, meet

    def encode(self, streams: dict[str, torch.Tensor]) -> torch.Tensor:
        self._meet()
        return streams["mfcc"][..., :WIDTH].float() + self._error


def latents_of(store: Store, codec: Any, split: str = "train", counts: Sequence[int] = (3, 2, 1)) -> LatentDataset:
    clips, export = store.at("shards"), SimpleNamespace(hash="e" * 32)
    source = make_clips(clips, counts) if not clips.exists(CURRENT) else load_manifest(clips)
    made: Any = Dataset(export, store, clips, source.hash, store.at("home"), split, "stop")  # type: ignore[arg-type]
    made.__dict__["codec"] = codec
    return made


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process."""

    def map_tasks(function: Callable[..., Any], calls: list[tuple[Any, ...]], _: Workers, shared: Any, account: Any) -> Iterator[Any]:
        for number, call in enumerate(calls):
            yield number, function(shared, *call)

    monkeypatch.setattr(building, "map_tasks", map_tasks)


def build(latents: LatentDataset) -> Manifest:
    return build_latents(latents, Workers(), lambda done, total: None)


def damage(latents: LatentDataset, manifest: Manifest) -> list[Any]:
    """What of the things that the manifest names is not what it says."""
    read_range(latents.store, manifest)  # verified
    return [one for position in range(3) for one in check_shard((latents.store, manifest), "train", position)]


class Watched:
    """A store that notes which names are written more than once, unless with what was there before."""

    def __init__(self, store: Store, overwritten: list[str]):
        self._store, self._overwritten = store, overwritten

    def __getattr__(self, name: str) -> Any:
        if name in ("put", "put_file"):
            return lambda key, data: self._put(name, key, data)
        return getattr(self._store, name)

    def _put(self, name: str, key: str, data: Any) -> None:
        before = self._store.read(key) if self._store.exists(key) else None
        getattr(self._store, name)(key, data)
        if before is not None and before != self._store.read(key):
            self._overwritten.append(key)


def test_of_two_builders_whose_devices_give_other_last_bits_one_decides_each_shard_and_nothing_is_overwritten(store: Store) -> None:
    latents_of(store, Codec())
    barrier, overwritten = Barrier(2), list[str]()

    def meet() -> None:
        try:
            barrier.wait(5)
        except BrokenBarrierError:
            pass

    builders = [latents_of(store, Codec(error, meet)) for error in (0.0, 1e-3)]
    for one in builders:
        one.__dict__["store"] = Watched(one.store, overwritten)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, builders)
    tars = {entry.key for entry in builders[0].store.list("train/") if entry.key.endswith(".tar")}
    assert len(tars) > 3 and not barrier.broken, "both encoded the same shards at the same time, and differed"
    assert first.hash == second.hash and overwritten == []
    assert damage(builders[0], first) == []


def test_the_one_that_comes_later_takes_what_is_there(store: Store) -> None:
    first, second = (latents_of(store, Codec(error)) for error in (0.0, 1e-3))
    done = encode_shard(first, "train", 0)
    assert encode_shard(second, "train", 0) == done
    assert done.number == f"000000-{done.info.tar}" and first.store.exists(f"train/{done.number}.tar") and done.range.endswith(".range.npy")


def test_latents_that_the_version_before_began_are_gone_on_with_and_stay_as_they_are(store: Store) -> None:
    """It named shards and ranges by their number alone, and its records did not name them."""
    latents, whole = latents_of(store, Codec()), latents_of(store.at("whole"), Codec())
    old = encode_shard(latents, "train", 0)
    target = latents.store
    for suffix in ("tar", "index.npy"):
        target.put(f"train/000000.{suffix}", target.read(f"train/{old.number}.{suffix}"))
        target.delete(f"train/{old.number}.{suffix}")
    target.put("train/000000.range.npy", target.read(old.range))
    target.delete(old.range)
    record = json.loads(target.read("train/000000.done.json"))
    for name in ("number", "range", "sums"):
        del record[name]
    target.put("train/000000.done.json", json.dumps(record).encode())
    before = {entry.key: target.read(entry.key) for entry in target.list()}
    manifest = build(latents)
    assert manifest.split("train").shards.number[0] == 0 and damage(latents, manifest) == []
    assert {key: target.read(key) for key in before} == before
    everything = build(whole)
    assert manifest.split("train").shards.tar == everything.split("train").shards.tar
    assert all(map(np.array_equal, read_range(target, manifest), read_range(whole.store, everything)))
    assert read_range(target, manifest)[0].shape == (FRAMES, WIDTH)
    with pytest.raises(ValueError, match=r"kept no mean .*normalisation=variance.*delete that folder"):
        read_moments(target, manifest)
    read_moments(whole.store, everything)


def test_the_mean_and_deviation_of_the_training_split_are_kept_beside_its_range(store: Store) -> None:
    latents = latents_of(store, Codec())
    manifest = build(latents)
    reader = Reader(latents.store, manifest, "train")
    every = np.stack([reader.read(clip, [(person, LATENT)]).arrays[person, LATENT] for clip in range(6) for person in PERSONS])
    rows = every.reshape(-1, WIDTH).astype(np.float64)
    for found, wanted in zip(read_moments(latents.store, manifest), (rows.mean(0), rows.std(0)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_sums_of_shards_are_added_in_order_and_few_of_them_are_in_memory_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of mean and deviation are those of a sum over all shards at once, which every dataset that is there was made by."""
    latents, decoded, most = latents_of(store, Codec(), counts=[1] * 9), [], 0

    def decode(data: bytes) -> np.ndarray:
        nonlocal most
        decoded.append(ref(array := decode_npy(data)))
        most = max(most, sum(one() is not None for one in decoded))
        return array

    monkeypatch.setattr(building, "decode_npy", decode)
    manifest = build(latents)
    assert len(decoded) == 2 * 9 and most <= 3
    every = [decode_npy(latents.store.read(entry.key)) for entry in latents.store.list("train/") if entry.key.endswith(".sums.npy")]
    count, total, squares = np.sum(every, axis=0)
    mean = total / count
    expected = encode_npy(np.stack((mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0)))))
    assert manifest.provenance[MOMENTS]["hash"] == content_hash(expected)


def test_an_encoding_of_several_parts_is_kept_part_by_part(store: Store) -> None:
    latents, whole = latents_of(store, Codec()), latents_of(store.at("whole"), Codec())
    latents.__dict__["others"] = parts = {"voice": 1, "face": WIDTH - 1}
    manifest, one = build(latents), build(whole)
    assert [(spec.name, spec.width) for spec in manifest.stream_specs] == list(parts.items())
    read = Reader(latents.store, manifest, "train").read(2, [("b", "voice"), ("b", "face")]).arrays
    both = Reader(whole.store, one, "train").read(2, [("b", LATENT)]).arrays["b", LATENT]
    assert np.array_equal(np.concatenate([read["b", part] for part in parts], axis=-1), both)
    assert all(map(torch.equal, read_moments(latents.store, manifest), read_moments(whole.store, one)))


def test_while_a_clip_is_encoded_the_next_ones_are_read_and_no_more_than_there_is_room_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun, encoded, changed = Reader.read, list[int](), list[int](), Condition()

    def noted(reader: Reader, clip: int, wanted: Any) -> Any:
        with changed:
            begun.append(clip)
            changed.notify_all()
        return read(reader, clip, wanted)

    def meet() -> None:
        ahead = min(len(encoded) + 1 + 2, 6)
        with changed:
            assert changed.wait_for(lambda: len(begun) >= ahead, timeout=60), f"{len(begun)} of 6 reads when clip {len(encoded)} is encoded"
            assert sorted(begun) == list(range(ahead))
        encoded.append(len(encoded))

    whole = encode_shard(latents_of(store, Codec(), counts=[6]), "train", 0)
    monkeypatch.setattr(Reader, "read", noted)
    clip = 2 * FRAMES * 26 * 2
    for room in ({"MOST_AHEAD": 2}, {"READ_AHEAD": 3 * clip - 1}):
        with monkeypatch.context() as patch:
            for name, value in room.items():
                patch.setattr(encoding, name, value)
            home = latents_of(store, Codec(meet=meet))
            home.__dict__["store"] = store.at("-".join(room))
            assert encode_shard(home, "train", 0) == whole
        assert len(encoded) == 6
        begun.clear()
        encoded.clear()
