"""Tars that another program wrote become a dataset where they are: every one is read once and gets an index, the manifest comes last.

They are `<split>/<any name>.tar` below one URL and are never changed. The same command again resumes, or adds the tars that are new:
what was published keeps its place, as in `cluster/data/prepare.py`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from cluster.config.schema import Workers
from cluster.data.manifest import CURRENT, HASH_DIGITS, File, Manifest, Split, StreamEntry, current_manifest, publish_successor
from cluster.data.sequential import SequentialReader
from cluster.data.shards import ShardInfo, decode_npy, encode_npy
from cluster.data.tar_scan import ClipFormat, first_format, read_tar
from cluster.runtime.tasks import map_tasks
from cluster.storage import AlreadyExists, NotFound, Store, content_hash
from reactdiff.clip import TARGETS
from reactdiff.data.sample import StreamKind

STREAM_KINDS: dict[str, StreamKind] = {"va": "facial", "au": "facial", "fer": "facial", "mfcc": "acoustic", "w2v": "acoustic"}
"""The class of each stream of the official data."""

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


class Tar(NamedTuple):
    """A tar in the store: its split, its file name without `.tar`, and its size in bytes."""

    split: str
    stem: str
    size: int

    @property
    def name(self) -> str:
        """The name of the shard."""
        return f"{self.split}/{self.stem}"


@dataclass(frozen=True)
class IndexResult:
    """What indexing came to.

    Attributes:
        manifest: the dataset's state.
        added: split -> clips that were added.
        ignored: split -> members of the new tars that are no arrays of a person.
    """

    manifest: Manifest
    added: dict[str, int]
    ignored: dict[str, int]


@dataclass(frozen=True)
class Record:
    """What is kept beside a tar that was read.

    Attributes:
        info: what the manifest keeps.
        ignored: members that are no arrays of a person.
        form: what every clip of it has.
    """

    info: ShardInfo
    ignored: int
    form: ClipFormat


def index_tars(store: Store, kinds: Mapping[str, StreamKind], progress: Callable[[int, int], None]) -> IndexResult:
    """Make or grow the dataset of the tars in `store`.

    Args:
        store: where they are.
        kinds: class of each stream that is not of the official data.
        progress: called with (tars read, tars to read).

    Raises:
        ValueError: if there are no tars, if one is not what a dataset needs, or if the dataset there is another one.
        StorageError: if the store fails.
    """
    old, etag = current_manifest(store) if store.exists(CURRENT) else (None, "")
    tars = _list_tars(store)
    new = _new_tars(store, old, tars)
    form = _format_of(old) if old else first_format(SequentialReader(store, f"{new[0].name}.tar", new[0].size))
    streams = _streams(store, old, form, kinds)
    store.assert_conditional_writes()
    records: dict[Tar, Record] = {}
    for number, record in map_tasks(index_tar, [(tar.name, tar.size) for tar in new], Workers(), shared=(store, form)):
        records[new[number]] = record
        progress(len(records), len(new))
    splits = {}
    for split in sorted({tar.split for tar in tars}):
        shards = (old.splits.get(split, Split()) if old else Split()).shards
        shards = shards.plus({tar.stem: records[tar].info for tar in new if tar.split == split})
        splits[split] = Split(shards=shards, appropriateness=_appropriateness(store, split, sum(shards.clips)))
    manifest = Manifest(
        origin=old.identity if old else "",
        kind="clips",
        frames=form.frames,
        streams=streams,
        targets=TARGETS,
        members=list(form.members),
        splits=splits,
        provenance={"source": "tars"},
    )
    _assert_distinct(manifest)
    added, ignored = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    for tar, record in records.items():
        added[tar.split] += record.info.clips
        ignored[tar.split] += record.ignored
    return IndexResult(publish_successor(store, manifest, old, etag), added, ignored)


def index_tar(shared: tuple[Store, ClipFormat], name: str, size: int) -> Record:
    """Read one tar and write its index beside it, unless its record says that this is done. The record is written last.

    Raises:
        ValueError: if the tar is not what the dataset needs, or not the one that was read before.
        StorageError: if it cannot be read.
    """
    (store, form), key = shared, f"{name}.indexed.json"
    try:
        values = json.loads(store.read(key))
    except NotFound:
        pass
    else:
        record = Record(ShardInfo(**values["info"]), values["ignored"], ClipFormat(**values["form"]))
        if record.info.bytes != size:
            raise ValueError(
                f"{store.url}/{name}.tar has {size} bytes, but had {record.info.bytes} when it was read; tars must not change: restore it, "
                f"or, if no dataset has it yet, delete {name}.index.npy and {key}"
            )
        if record.form == form:
            return record
    file = SequentialReader(store, f"{name}.tar", size)
    rows, ignored = read_tar(file, form)
    data = encode_npy(rows)
    try:
        store.create(f"{name}.index.npy", data)
    except AlreadyExists as error:
        if store.read(f"{name}.index.npy") != data:
            raise ValueError(
                f"{store.url}/{name}.index.npy is there, but is not the index of {name}.tar: if no dataset has the tar yet, delete the "
                "index, else restore the tar"
            ) from error
    record = Record(ShardInfo(len(rows), size, file.digest(), content_hash(data)), ignored, form)
    store.put(key, json.dumps(asdict(record)).encode())
    return record


def _list_tars(store: Store) -> list[Tar]:
    """All tars of all splits, in the order of their names.

    Raises:
        ValueError: if there are none, or one that cannot be used.
    """
    tars: list[Tar] = []
    elsewhere: dict[str, str] = {}
    for entry in store.list():
        folder, _, name = entry.key.rpartition("/")
        if folder and "/" not in folder:
            if name.endswith(COMPRESSED):
                raise ValueError(f"{store.url}/{entry.key} is compressed, so nothing can be read from its middle: decompress it")
            if name.endswith(".tar"):
                tars.append(Tar(folder, name.removesuffix(".tar"), entry.size))
        elif name.endswith((".tar", *COMPRESSED)):
            elsewhere.setdefault(folder.partition("/")[0], entry.key)
    splits = {tar.split for tar in tars}
    if stray := next((key for top, key in elsewhere.items() if not top or top in splits), ""):
        raise ValueError(f"{store.url}/{stray}: the tars of a dataset lie at <split>/<name>.tar; move it there, or away")
    if not tars:
        raise ValueError(f"there are no tars at {store.url}: they must lie there as <split>/<name>.tar, for example train/part-0.tar")
    return sorted(tars)


def _new_tars(store: Store, old: Manifest | None, tars: list[Tar]) -> list[Tar]:
    """The tars that the dataset does not have yet; those it has must still be there, and of the same size."""
    if old is None:
        return tars
    sizes = {(tar.split, tar.stem): tar.size for tar in tars}
    known = set()
    for split, part in old.splits.items():
        for name, expected in zip(part.shards.number, part.shards.bytes, strict=True):
            if isinstance(name, int):
                raise ValueError(
                    f"the dataset at {store.url} was prepared from a tree, and grows with it (react2024): "
                    "index tars of other programs at a URL of their own"
                )
            known.add((split, name))
            if (size := sizes.get((split, name))) != expected:
                actual = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{store.url}/{split}/{name}.tar {actual}, but the dataset has it with {expected} bytes, and shards never change: "
                    "restore it, and give other content another name"
                )
    return [tar for tar in tars if (tar.split, tar.stem) not in known]


def _assert_distinct(manifest: Manifest) -> None:
    """No tar is there twice: clips would count twice, or be in training and test."""
    names: dict[str, str] = {}
    for split, part in manifest.splits.items():
        for position in range(len(part.shards)):
            name, digest = manifest.shard(split, position), part.shards.tar[position * HASH_DIGITS : (position + 1) * HASH_DIGITS]
            if digest in names:
                raise ValueError(f"{name}.tar and {names[digest]}.tar are the same, byte for byte: remove one of them")
            names[digest] = name


def _format_of(manifest: Manifest) -> ClipFormat:
    return ClipFormat(manifest.frames, {stream.name: stream.width for stream in manifest.streams} | manifest.targets)


def _streams(store: Store, old: Manifest | None, form: ClipFormat, kinds: Mapping[str, StreamKind]) -> list[StreamEntry]:
    """The streams with their classes, in the order of their names."""
    before: dict[str, StreamKind] = {stream.name: stream.kind for stream in old.streams} if old else {}
    widths = {name: width for name, width in sorted(form.widths.items()) if name not in TARGETS}
    for name, kind in kinds.items():
        if name not in widths:
            raise ValueError(f"--{kind} {name}: the tars at {store.url} have no such stream; they have {', '.join(widths)}")
        if before.get(name, kind) != kind:
            raise ValueError(f"--{kind} {name}: the dataset at {store.url} has it as {before[name]}, and that never changes")
    known = {**STREAM_KINDS, **before, **kinds}
    if unknown := [name for name in widths if name not in known]:
        names = ",".join(unknown)
        raise ValueError(f"is {unknown[0]} a stream of the face or of the voice? Say --facial {names} or --acoustic {names}")
    return [StreamEntry(name=name, kind=known[name], width=width) for name, width in widths.items()]


def _appropriateness(store: Store, split: str, clips: int) -> File | None:
    """The split's matrix, if it is there: checked, and copied under a name with its hash, since it changes when the split grows."""
    key = f"{split}/appropriateness.npy"
    try:
        data = store.read(key)
    except NotFound:
        return None
    try:
        matrix = decode_npy(data)
    except ValueError as error:
        raise ValueError(f"{store.url}/{key}: {error}") from error
    side = 2 * clips
    if matrix.dtype != np.bool_ or matrix.shape != (side, side):
        raise ValueError(
            f"{store.url}/{key} holds {matrix.dtype} {matrix.shape}, but the {clips} clips of the split need bool {(side, side)}: "
            "all clips in their order, then all mirrored"
        )
    if (empty := np.flatnonzero(~matrix.any(axis=1))).size:
        raise ValueError(f"{store.url}/{key}: {empty.size} rows have no True, the first is row {empty[0]}; every clip needs one, itself")
    digest = content_hash(data)
    part = File(file=f"{split}/appropriateness-{digest}.npy", hash=digest)
    store.put(part.file, data)
    return part
