"""What a dataset is: an immutable manifest for each of its states, and `dataset.json`, which names the current one.

Reading one takes time and memory in proportion to the number of shards, whatever they hold.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from cluster.data.shards import ShardInfo, decode_npy, shard_name
from cluster.storage import AlreadyExists, NotFound, Stale, Store, content_hash
from cluster.storage.hashing import HashMismatch, read_verified
from reactdiff.data.sample import StreamKind, StreamSpec

CURRENT = "dataset.json"
HASH_DIGITS = 32
"""Hex digits of a hash."""


class NoDataset(ValueError):
    """There is no dataset at a URL."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Entry):
    """A file of the dataset and the hash of its content."""

    file: str
    hash: str


class ShardTable(_Entry):
    """The shards of a split, as columns.

    Attributes:
        number: of each shard, within the split: it is in folder `split` as `<number>.tar`. Tars that another program wrote keep
            their names instead.
        clips: of each shard.
        bytes: of each tar.
        tar: the tars' hashes, 32 hex digits each, in one text: 10^5 short texts would take four times the memory.
        index: the indices' hashes, likewise.
    """

    number: list[int | str] = []
    clips: list[int] = []
    bytes: list[int] = []
    tar: str = ""
    index: str = ""

    @model_validator(mode="after")
    def _columns(self) -> "ShardTable":
        lengths = {len(self.number), len(self.clips), len(self.bytes), len(self.tar) / HASH_DIGITS, len(self.index) / HASH_DIGITS}
        if len(lengths) != 1:
            raise ValueError("the columns of the shard list have different lengths")
        return self

    def __len__(self) -> int:
        return len(self.number)

    def info(self, position: int) -> ShardInfo:
        """What is kept of the shard at this position."""
        digits = slice(position * HASH_DIGITS, (position + 1) * HASH_DIGITS)
        return ShardInfo(self.clips[position], self.bytes[position], self.tar[digits], self.index[digits])

    def plus(self, added: Mapping[int | str, ShardInfo]) -> "ShardTable":
        """These shards and then, by number or name, new ones."""
        return ShardTable(
            number=[*self.number, *added],
            clips=[*self.clips, *(info.clips for info in added.values())],
            bytes=[*self.bytes, *(info.bytes for info in added.values())],
            tar=self.tar + "".join(info.tar for info in added.values()),
            index=self.index + "".join(info.index for info in added.values()),
        )


class Split(_Entry):
    """One split.

    Attributes:
        shards: in the order of their clips.
        appropriateness: the (2n, 2n) bool matrix of its n clips, where the split is for evaluation.
        subjects: JSON {"a": [...], "b": [...]} of who is seen in each clip, in the order of clips, where it is known.
    """

    shards: ShardTable = ShardTable()
    appropriateness: File | None = None
    subjects: File | None = None


class StreamEntry(_Entry):
    """One input stream of every person."""

    name: str
    kind: StreamKind
    width: int


class Manifest(_Entry):
    """One state of a dataset.

    Attributes:
        version: of this format.
        origin: hash of the dataset's first manifest; empty in that one.
        kind: what a sample holds.
        frames: of every clip.
        dtype: of the input streams.
        streams: the inputs, in order.
        targets: name -> width of the float32 arrays.
        members: of every clip, in the order of the index.
        splits: name -> shards.
        provenance: where the data comes from, for people.
    """

    version: Literal[1] = 1
    origin: str = ""
    kind: Literal["clips", "latents"]
    frames: int
    dtype: Literal["float16"] = "float16"
    streams: list[StreamEntry]
    targets: dict[str, int]
    members: list[str]
    splits: dict[str, Split]
    provenance: dict[str, Any] = {}
    _hash: str = PrivateAttr("")

    @property
    def hash(self) -> str:
        """What names this state: the hash of its canonical JSON."""
        if not self._hash:
            self._hash = content_hash(self.encode())
        return self._hash

    @property
    def identity(self) -> str:
        """What names the dataset in all its states: the hash of the first."""
        return self.origin or self.hash

    @property
    def stream_specs(self) -> tuple[StreamSpec, ...]:
        """The input streams as the science knows them."""
        return tuple(StreamSpec(stream.name, stream.kind, stream.width) for stream in self.streams)

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            ValueError: if there is none, naming those there are.
        """
        if name not in self.splits:
            raise ValueError(f"the dataset has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def counts(self, split: str) -> np.ndarray:
        """Clips of each shard of a split, (shards,) int64."""
        return np.array(self.split(split).shards.clips, dtype=np.int64)

    def shard(self, split: str, position: int) -> str:
        """The name of the shard at this position of a split."""
        number = self.split(split).shards.number[position]
        return shard_name(split, number) if isinstance(number, int) else f"{split}/{number}"

    def encode(self) -> bytes:
        """The canonical JSON."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()


def manifest_file(digest: str) -> str:
    """The key of the manifest of this hash."""
    return f"manifest-{digest}.json"


def load_manifest(store: Store, digest: str = "") -> Manifest:
    """The manifest of this hash, or the current one.

    Raises:
        NoDataset: if there is no dataset.
        ValueError: if there is no such state, a damaged manifest, or one of another version.
    """
    return _load(store, digest) if digest else current_manifest(store)[0]


def current_manifest(store: Store) -> tuple[Manifest, str]:
    """The current manifest, and the etag by which `publish` replaces it.

    Raises:
        NoDataset, ValueError: as `load_manifest`.
    """
    try:
        data, etag = store.get(CURRENT)
    except NotFound as error:
        raise NoDataset(
            f"there is no dataset at {store.url} (no {CURRENT}); make one: python jobs/prepare.py react2024 TREE {store.url} "
            "(or index, where WebDataset tars lie there), or correct data.url"
        ) from error
    try:
        name = str(json.loads(data)["manifest"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'{store.url}/{CURRENT} should be {{"manifest": "manifest-<hash>.json"}}, but is {data[:200]!r}') from None
    return _load(store, name.removeprefix("manifest-").removesuffix(".json")), etag


def publish(store: Store, manifest: Manifest, etag: str = "") -> None:
    """Write a manifest and make it the current one; everything it names must be in the store.

    Args:
        store: the dataset.
        manifest: its new state.
        etag: of the state it follows, from `current_manifest`; empty for the first.

    Raises:
        AlreadyExists: if it should be the first, but another process published one.
        Stale: if another process published a state since.
    """
    store.put(manifest_file(manifest.hash), manifest.encode())
    pointer = json.dumps({"manifest": manifest_file(manifest.hash)}).encode()
    if etag:
        store.replace(CURRENT, pointer, etag)
    else:
        store.create(CURRENT, pointer)


def publish_successor(store: Store, manifest: Manifest, old: Manifest | None, etag: str) -> Manifest:
    """Publish what a dataset has become, and return the state that is current in the end.

    Args:
        store: the dataset.
        manifest: its state now.
        old: its state before, None if there was none; it stays if nothing but the origin would change.
        etag: of the old state, from `current_manifest`.

    Raises:
        AlreadyExists: as `publish`, unless what was published is the same.
        Stale: likewise.
    """
    if old and manifest.model_copy(update={"origin": old.origin}).encode() == old.encode():
        return old
    try:
        publish(store, manifest, etag)
    except (AlreadyExists, Stale):
        if load_manifest(store).hash != manifest.hash:
            raise
    return manifest


def load_appropriateness(store: Store, manifest: Manifest, split: str) -> np.ndarray | None:
    """The (2n, 2n) bool matrix of a split's n clips, all pairs plain, then mirrored; None where there is none.

    Raises:
        ValueError: if the file is not the one the manifest names.
    """
    part = manifest.split(split).appropriateness
    return None if part is None else decode_npy(read_file(store, part))


def read_file(store: Store, part: File) -> bytes:
    """A file that a manifest names, compared with its hash.

    Raises:
        ValueError: if they differ.
    """
    try:
        return read_verified(store, part.file, part.hash)
    except HashMismatch as error:
        raise ValueError(f"{error}: restore it from a copy") from None


def _load(store: Store, digest: str) -> Manifest:
    where = f"{store.url}/{manifest_file(digest)}"
    try:
        data = read_verified(store, manifest_file(digest), digest)
    except NotFound as error:
        raise ValueError(f"the dataset at {store.url} has no state {digest} ({where} is missing): correct data.manifest") from error
    except HashMismatch as error:
        raise ValueError(f"{error}: it was changed or damaged; restore it from a copy") from None
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = next((e for e in error.errors() if e["loc"] == ("version",)), error.errors()[0])
        key = ".".join(str(part) for part in first["loc"])
        rule = "this program reads version 1: use the release that wrote it" if key == "version" else first["msg"]
        raise ValueError(f"{where}: {key} is {first['input']!r}; {rule}") from None
    manifest._hash = digest
    return manifest
