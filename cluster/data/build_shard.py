"""One shard of a dataset, built from a tree of clips unless it is there already: the task that `prepare` runs once for each shard."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from cluster.data.shards import ShardInfo, encode_npy, members, read_index, upload_shard
from cluster.runtime.stuck import alive
from cluster.storage import NotFound, Store, content_hash
from reactdiff.clip import PERSONS, TARGETS
from reactdiff.data.files import ClipError
from reactdiff.data.sample import Clip, StreamSpec

VERSION = 1
"""Of the rules by which clips become the bytes of a shard."""


class Pair(Protocol):
    """One clip of a tree that has not been read yet."""

    @property
    def key(self) -> str:
        """The clip's key."""


class Tree(Protocol):
    """Where clips come from, for example `reactdiff.data.react2024.Tree`; it pickles."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The input streams of every person."""

    @property
    def frames(self) -> int:
        """Frames of every clip."""

    def pairs(self, split: str) -> Sequence[Any]:
        """The clips of a split (`Pair`), in order."""

    def read(self, pair: Any) -> Clip:
        """One clip, or a `ClipError`."""

    def appropriateness(self, split: str) -> np.ndarray | None:
        """The (2n, 2n) bool matrix of a split."""

    def provenance(self) -> dict[str, Any]:
        """Where the data comes from."""


@dataclass(frozen=True)
class ShardSource:
    """What all shards of one preparation share.

    Attributes:
        tree: where clips come from.
        store: the dataset.
        strict: whether one refused clip ends the preparation.
    """

    tree: Tree
    store: Store
    strict: bool

    @property
    def arrays(self) -> list[str]:
        """Names of each person's arrays."""
        return [*(stream.name for stream in self.tree.streams), *TARGETS]

    def content(self, pairs: Sequence[Pair]) -> str:
        """A hash that stands for the content of a shard of these clips."""
        streams = [asdict(stream) for stream in self.tree.streams]
        return content_hash(json.dumps([VERSION, self.strict, self.tree.frames, streams, [pair.key for pair in pairs]]).encode())


@dataclass(frozen=True)
class BuiltShard:
    """What came of building a shard; the record that is kept of one that is in the store.

    Attributes:
        info: what the manifest keeps; of no clips where nothing was written.
        refused: key and reason of each clip that was left out.
        subjects: who is seen in each clip, person -> names or None, in the order of clips.
    """

    info: ShardInfo
    refused: list[tuple[str, str]]
    subjects: dict[str, list[str | None]]

    def encode(self) -> bytes:
        """The record as JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(data: bytes) -> "BuiltShard":
        """The record that `encode` wrote."""
        record = json.loads(data)
        return BuiltShard(ShardInfo(**record["info"]), [tuple(entry) for entry in record["refused"]], record["subjects"])


class _NothingToWrite(Exception):
    """No clip of a shard can be used, or one was refused where every clip is needed."""


def build_shard(source: ShardSource, name: str, pairs: Sequence[Pair]) -> BuiltShard:
    """Build a shard of all usable clips, unless its record says that this is done. The record is written last.

    Nothing is written of a shard without clips, or of one with a refused clip where `strict`.

    Raises:
        ValueError: if the shard there was made of other data.
        StorageError: if it cannot be written.
    """
    store, record = source.store, f"{name}.done.json"
    try:
        built = BuiltShard.decode(store.read(record))
    except NotFound:
        pass
    else:
        assert_unchanged(source, name, built.info, pairs)
        return built
    refused: list[tuple[str, str]] = []
    subjects: dict[str, list[str | None]] = {person: [] for person in PERSONS}
    try:
        info = upload_shard(store, name, _usable_clips(source, pairs, refused, subjects), source.arrays)
    except _NothingToWrite:
        return BuiltShard(ShardInfo(0, 0, "", ""), refused, subjects)
    built = BuiltShard(info, refused, subjects)
    store.put(record, built.encode())
    return built


def assert_unchanged(source: ShardSource, name: str, info: ShardInfo, pairs: Sequence[Pair]) -> None:
    """Read the first clip of a shard from the tree again: a shard is never rewritten, so its clips must still be these.

    Raises:
        ValueError: if the clip differs, naming it, or if the shard is not whole.
    """
    store = source.store
    if (size := store.size(f"{name}.tar")) != info.bytes:
        raise ValueError(f"{store.url}/{name}.tar has {size} bytes, but was written with {info.bytes}; restore it from a copy")
    row = read_index(store, name, info.index)[0]
    pair = next(pair for pair in pairs if pair.key.encode() == bytes(row["key"]))
    clip = checked_clip(source.tree, pair)
    for member, crc in zip(members(source.arrays)[:-1], row["crc"], strict=False):  # the JSON may change: rows of a CSV move
        person, array, _ = member.split(".")
        if crc32c(encode_npy(clip.people[person][array])) != crc:
            raise ValueError(
                f"{store.url}/{name}.tar was prepared from other data: clip {clip.key}, member {member} differs from the tree's. "
                "Shards are never rewritten: prepare to another URL, or delete this dataset first"
            )


def checked_clip(tree: Tree, pair: Pair) -> Clip:
    """A clip that has every array in the dataset's shape and dtype, and finite numbers only.

    Raises:
        ClipError: naming the clip, the array and the rule.
    """
    clip = tree.read(pair)
    shapes: dict[str, tuple[np.dtype, tuple[int, int]]] = {s.name: (np.dtype(np.float16), (tree.frames, s.width)) for s in tree.streams}
    shapes |= {name: (np.dtype(np.float32), (tree.frames, width)) for name, width in TARGETS.items()}
    for person in PERSONS:
        for name, (dtype, shape) in shapes.items():
            array, where = clip.people[person].get(name), f"{person}.{name}"
            if array is None or array.shape != shape or array.dtype != dtype:
                actual = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise ClipError(clip.key, where, f"it is {actual}, but in this dataset it is {dtype} {shape}")
            if not np.isfinite(array).all():
                row, column = np.argwhere(~np.isfinite(array))[0]
                raise ClipError(clip.key, where, f"row {row}, column {column} is {array[row, column]}; all numbers must be finite")
    return clip


def _usable_clips(
    source: ShardSource, pairs: Sequence[Pair], refused: list[tuple[str, str]], subjects: dict[str, list[str | None]]
) -> Iterator[Clip]:
    """The clips that can be used, one at a time; the others are added to `refused`, and who is seen in a clip to `subjects`.

    Raises:
        _NothingToWrite: after the last clip, if the shard is not to be written.
    """
    for pair in pairs:
        alive()
        try:
            clip = checked_clip(source.tree, pair)
        except ClipError as error:
            refused.append((pair.key, str(error)))
        else:
            for person in PERSONS:
                subjects[person].append(clip.meta.get("subjects", {}).get(person))
            yield clip
    if len(refused) == len(pairs) or (refused and source.strict):
        raise _NothingToWrite
