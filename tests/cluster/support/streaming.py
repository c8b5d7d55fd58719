"""Datasets with shards of any sizes, streams of them, and a store that remembers what was read of it."""

import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastcrc.crc32 import iscsi as crc32c

from cluster.data.cache import Cache
from cluster.data.manifest import Manifest, ShardTable, Split, StreamEntry, load_manifest, publish
from cluster.data.other_targets import OtherTargets
from cluster.data.quarantine import Quarantine
from cluster.data.reader import Reader
from cluster.data.shards import ShardInfo, members, read_index, shard_name, write_shard
from cluster.data.stream import Batch, Share, Stream
from cluster.storage import Store
from cluster.storage.base import OnBytes, ignore_bytes
from cluster.storage.folder import FolderStore
from reactdiff.clip import PERSONS, TARGETS
from reactdiff.config import Diffusion
from reactdiff.data.keyed import generator
from reactdiff.data.order import Order
from reactdiff.data.sample import Clip, StreamSpec
from reactdiff.stage import LATENT, AutoencoderStage, DiffusionStage, Source, Stage
from tests.reactdiff.model.small import MODEL

FRAMES = 50


def read_range(store: Store, key: str, start: int, length: int) -> bytes:
    """What `read_into` brings, which it must also tell of: each byte once, in order, whatever happens on the way."""
    buffer, told = bytearray(length), bytearray()
    store.read_into(key, start, memoryview(buffer), on_bytes=told.extend)
    assert told == buffer
    return bytes(buffer)


def make_clips(store: Store, counts: Sequence[int], mfcc: int = 26, unread: int = 0) -> Manifest:
    """A dataset of clips with so many in each shard, the stream `mfcc`, and one that no model of the tests reads."""
    streams = {"mfcc": mfcc} | ({"unread": unread} if unread else {})
    kinds = {name: (width, np.float16) for name, width in streams.items()} | {name: (width, np.float32) for name, width in TARGETS.items()}
    return _make(store, counts, "clips", kinds, [StreamEntry(name=name, kind="acoustic", width=width) for name, width in streams.items()])


def make_latents(store: Store, counts: Sequence[int], width: int = 8) -> Manifest:
    """A dataset of latents with so many clips in each shard."""
    return _make(store, counts, "latents", {LATENT: (width, np.float16)}, [StreamEntry(name=LATENT, kind="latent", width=width)])


def _make(store: Store, counts: Sequence[int], kind: Any, arrays: dict[str, tuple[int, type]], streams: list[StreamEntry]) -> Manifest:
    made: dict[int, ShardInfo] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, count in enumerate(counts):
            path, name = Path(folder) / "shard.tar", shard_name("train", number)
            made[number] = write_shard(path, (_clip(number, row, arrays) for row in range(count)), arrays)
            store.put_file(f"{name}.tar", path)
            store.put_file(f"{name}.index.npy", path.with_suffix(".index.npy"))
    manifest = Manifest(
        kind=kind,
        frames=FRAMES,
        streams=streams,
        targets=dict(TARGETS) if kind == "clips" else {},
        members=list(members(arrays)),
        splits={"train": Split(shards=ShardTable().plus(made))},
    )
    publish(store, manifest)
    return manifest


def _clip(shard: int, row: int, arrays: dict[str, tuple[int, type]]) -> Clip:
    rng = generator("streaming", shard, row)
    people = {p: {n: rng.standard_normal((FRAMES, width)).astype(kind) for n, (width, kind) in arrays.items()} for p in PERSONS}
    return Clip(f"clip-{shard}-{row}", people)


def expected(manifest: Manifest, item: int, position: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What an item at a position holds, made anew: no store, no reader."""
    kinds = {stream.name: (stream.width, np.float16) for stream in manifest.streams}
    kinds |= {name: (width, np.float32) for name, width in manifest.targets.items()}
    first = np.concatenate(([0], np.cumsum(manifest.counts("train"))))
    clip, side = divmod(item, 2)
    shard = int(np.searchsorted(first, clip, side="right")) - 1
    people, stage = _clip(shard, clip - int(first[shard]), kinds).people, stage_of(manifest)
    return {name: people[person][array] for name, (person, array) in stage.reads(side).items()} | stage.draw(seed, position)


def stage_of(manifest: Manifest) -> Stage:
    """The stage that is trained on a dataset: the first on clips, reading `mfcc`; the second on latents."""
    return _stage(manifest.kind, tuple(spec for spec in manifest.stream_specs if spec.name != "unread"))


@lru_cache
def _stage(kind: str, specs: tuple[StreamSpec, ...]) -> Stage:
    if kind == "latents":
        return DiffusionStage(MODEL, Diffusion(), Source(specs, FRAMES))
    return AutoencoderStage(MODEL.model_copy(update={"facial": ()}), Source(specs, FRAMES))


def order_of(manifest: Manifest, seed: int = 0, block: int = 4, group: int = 2) -> Order:
    """The order of a dataset's items."""
    return Order(2 * manifest.counts("train"), seed, block, group)


def open_stream(
    store: Store,
    share: Share,
    *,
    order: Order | None = None,
    seed: int = 0,
    read_ahead: int = 64 << 20,
    readers: int = 2,
    cache: Cache | None = None,
    others: OtherTargets | None = None,
    quarantine: Quarantine | None = None,
) -> Stream:
    """The stream of this share of a dataset's current state."""
    manifest = load_manifest(store)
    reader, order = Reader(store, manifest, "train", cache), order or order_of(manifest, seed)
    return Stream(reader, stage_of(manifest), order, share, seed, read_ahead, readers, quarantine=quarantine, others=others)


def read_all(store: Store, share: Share, first_step: int = 0, **settings: Any) -> list[Batch]:
    """All batches of a share from a step on."""
    stream = open_stream(store, share, **settings)
    try:
        return list(stream.batches(first_step))
    finally:
        stream.close()


def ledgers(store: Store, batch: int, total: int, ranks: int = 1, **settings: Any) -> list[int]:
    """The ledger of every step, summed over ranks."""
    shares = (read_all(store, Share(batch, total, ranks, rank), **settings) for rank in range(ranks))
    return [sum(one.ledger for one in step) for step in zip(*shares, strict=True)]


def same(batch: Batch, other: Batch) -> bool:
    """Whether two batches are of the same positions, items and bits."""
    facts = all(getattr(batch, name) == getattr(other, name) for name in ("step", "positions", "items", "ledger"))
    return facts and batch.tensors.keys() == other.tensors.keys() and all(map(_equal, batch.tensors.values(), other.tensors.values()))


def joined(batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """The tensors of a step's shares one after the other."""
    parts = list(batches)
    return {name: torch.cat([batch.tensors[name] for batch in parts]) for name in parts[0].tensors}


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def damage(store: Store, shard: int, row: int, member: str) -> tuple[str, str, str]:
    """Flip a bit in the middle of a member; returns the clip's key, and the member's CRC32C before and after, in hexadecimal."""
    manifest = load_manifest(store)
    name = manifest.shard("train", shard)
    entry, place = read_index(store, name)[row], manifest.members.index(member)
    start, size = (int(entry[field][place]) for field in ("offset", "size"))
    content = bytearray(store.read(f"{name}.tar"))
    content[start + size // 2] ^= 1
    store.put(f"{name}.tar", bytes(content))
    return bytes(entry["key"]).decode(), f"{entry['crc'][place]:08x}", f"{crc32c(content[start : start + size]):08x}"


def cut(store: Store, shard: int, row: int, member: str) -> str:
    """Cut a shard's tar off in the middle of a member; returns the clip's key."""
    manifest = load_manifest(store)
    name = manifest.shard("train", shard)
    entry, place = read_index(store, name)[row], manifest.members.index(member)
    end = int(entry["offset"][place] + entry["size"][place] // 2)
    store.put(f"{name}.tar", store.read(f"{name}.tar")[:end])
    return bytes(entry["key"]).decode()


class Recorded(FolderStore):
    """A folder that remembers each read of a tar as (key, first byte, bytes)."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.reads: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        """Fill buffers from byte `start` on."""
        if key.endswith(".tar"):
            with self._lock:
                self.reads.append((key, start, sum(map(len, buffers))))
                self.noticed()
        super().read_into(key, start, *buffers, on_bytes=on_bytes)

    def noticed(self) -> None:
        """Called at every read, one at a time."""
