"""Whether a dataset is undamaged: every byte of it is read once and compared with its hashes, shard by shard over the cluster."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from cluster.config.schema import Workers
from cluster.data.manifest import File, Manifest, read_file
from cluster.data.sequential import SequentialReader
from cluster.data.shards import CorruptData, read_index
from cluster.runtime.tasks import map_tasks
from cluster.storage import NotFound, Store


@dataclass(frozen=True)
class Damage:
    """A file of a dataset that is not as it was written, and what is wrong with it."""

    split: str
    file: str
    what: str


def verify(store: Store, manifest: Manifest, workers: Workers, progress: Callable[[int, int], None]) -> list[Damage]:
    """Compare sizes, hashes and checksums of everything a state of a dataset names.

    Args:
        store: the dataset.
        manifest: its state.
        workers: what a task gets.
        progress: called with (shards done, shards in all).

    Returns:
        All damage there is, in the order of splits and shards.

    Raises:
        StorageError: if something that is there cannot be read, which says nothing about what it holds.
    """
    calls = [(split, position) for split, part in manifest.splits.items() for position in range(len(part.shards))]
    damage: dict[int, list[Damage]] = {}
    for number, found in map_tasks(check_shard, calls, workers, shared=(store, manifest)):
        damage[number] = found
        progress(len(damage), len(calls))
    return [*_files(store, manifest), *(one for number in sorted(damage) for one in damage[number])]


def _files(store: Store, manifest: Manifest) -> Iterator[Damage]:
    for split, part in manifest.splits.items():
        files: tuple[File | None, ...] = (part.appropriateness, part.subjects)
        for file in files:
            try:
                if file is not None:
                    read_file(store, file)
            except (NotFound, ValueError) as error:
                yield Damage(split, file.file if file else "", str(error))


def check_shard(shared: tuple[Store, Manifest], split: str, position: int) -> list[Damage]:
    """Read one shard from end to end.

    Raises:
        StorageError: as `verify`.
    """
    store, manifest = shared
    name, info = manifest.shard(split, position), manifest.split(split).shards.info(position)
    tar = f"{name}.tar"
    try:
        index = read_index(store, name, info.index)
    except (NotFound, CorruptData) as error:
        return [Damage(split, f"{name}.index.npy", str(error))]
    try:
        if (size := store.size(tar)) != info.bytes:
            return [Damage(split, tar, f"it has {size} bytes, but was written with {info.bytes}{_lost(index, size)}")]
        all_members = [
            (int(offset), int(size), int(crc), bytes(row["key"]).decode(), member)
            for row in index
            for offset, size, crc, member in zip(row["offset"], row["size"], row["crc"], manifest.members, strict=True)
        ]
        damage, file = [], SequentialReader(store, tar, info.bytes)
        for offset, size, crc, clip, member in sorted(all_members):
            file.seek(offset)
            actual = 0
            for piece in file.chunks(size):
                actual = crc32c(piece, actual)
            if actual != crc:
                damage.append(Damage(split, tar, f"clip {clip}, member {member}: checksum {actual:08x}, but written with {crc:08x}"))
        actual_hash = file.digest()
    except NotFound as error:
        return [Damage(split, tar, str(error))]
    if len(index) != info.clips:
        damage.append(Damage(split, f"{name}.index.npy", f"it has {len(index)} clips, but the manifest says {info.clips}"))
    if not damage and actual_hash != info.tar:
        damage.append(Damage(split, tar, f"between its members: hash {actual_hash}, but the manifest says {info.tar}"))
    return damage


def _lost(index: np.ndarray, size: int) -> str:
    """Which clips of a shard are not whole in a tar of this size, the end of a sentence; empty if all are."""
    keys = [bytes(key).decode() for key in index["key"][(index["offset"] + index["size"]).max(axis=1) > size]]
    if not keys:
        return ""
    return f": clip {keys[0]} is not whole" if len(keys) == 1 else f": clips {keys[0]} to {keys[-1]}, {len(keys)} in all, are not whole"
