"""Is a dataset whole? Every byte of it is read once and compared with what was written, shard by shard over the cluster."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crc32c import crc32c

from cluster.config.schema import Workers
from cluster.data.manifest import File, Manifest, read_file
from cluster.data.sequential import SequentialReader
from cluster.data.shards import CorruptData, read_index
from cluster.runtime.tasks import map_tasks
from cluster.storage import NotFound, Store


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written: a shard or file, and where in it and what."""

    split: str
    file: str
    what: str


def verify(store: Store, manifest: Manifest, workers: Workers, progress: Callable[[int, int], None]) -> list[Damage]:
    """Compare sizes, hashes and checksums of everything a state of a dataset names.

    Args:
        store: the dataset.
        manifest: its state.
        workers: what a task gets.
        progress: told (shards done, shards in all).

    Returns:
        All damage there is, in the order of splits and shards.

    Raises:
        StorageError: if something that is there cannot be read, which says nothing about what it holds.
    """
    calls = [(split, position) for split, part in manifest.splits.items() for position in range(len(part.shards))]
    found: dict[int, list[Damage]] = {}
    for number, damage in map_tasks(check_shard, calls, workers, shared=(store, manifest)):
        found[number] = damage
        progress(len(found), len(calls))
    return [*_files(store, manifest), *(damage for number in sorted(found) for damage in found[number])]


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
            return [Damage(split, tar, f"it has {size} bytes, but was written with {info.bytes}")]
        pieces = [
            (int(offset), int(size), int(crc), bytes(row["key"]).decode(), member)
            for row in index
            for offset, size, crc, member in zip(row["offset"], row["size"], row["crc"], manifest.members, strict=True)
        ]
        damage, tape = [], SequentialReader(store, tar, info.bytes)
        for offset, size, crc, clip, member in sorted(pieces):
            tape.seek(offset)
            actual = 0
            for part in tape.chunks(size):
                actual = crc32c(part, actual)
            if actual != crc:
                damage.append(Damage(split, tar, f"clip {clip}, member {member}: checksum {actual:08x}, but written with {crc:08x}"))
        actual_hash = tape.digest()
    except NotFound as error:
        return [Damage(split, tar, str(error))]
    if len(index) != info.clips:
        damage.append(Damage(split, f"{name}.index.npy", f"it has {len(index)} clips, but the manifest says {info.clips}"))
    if not damage and actual_hash != info.tar:
        damage.append(Damage(split, tar, f"between its members: hash {actual_hash}, but the manifest says {info.tar}"))
    return damage
