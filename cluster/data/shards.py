"""Shards: a tar that any WebDataset reader can read, and beside it an index that makes every clip one ranged read.

`<name>.tar` holds for each clip, in order, `<key>.<person>.<array>.npy` (sorted: one person's members lie side by side) and
`<key>.json`. `<name>.index.npy` has one fixed-width row per clip: its key, and offset, size and CRC32C of each member.
This is the only module that knows webdataset. Nothing here is unpickled.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from cluster.runtime.scratch import scratch_folder
from cluster.storage import Store, content_hash
from cluster.storage.hashing import HashMismatch, read_verified
from reactdiff.clip import PERSONS
from reactdiff.data.sample import Clip

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
ARRAY = re.compile(r"[A-Za-z0-9_-]{1,13}")
"""With the longest key a member's name still fits the 100 bytes of a plain tar header."""

NPY = b"\x93NUMPY\x01\x00"
"""The first bytes of a .npy file of version 1.0."""

BLOCK = 512
"""Bytes of a tar header, and what each member is padded to."""


class CorruptData(ValueError):
    """A member whose bytes are not those that were written, or are not there.

    Attributes:
        shard: its name, `<split>/<number>`.
        clip: the clip's key; empty if the index itself is damaged.
        member: `<person>.<array>.npy`, `json` or `index`.
        expected: the checksum it was written with.
        actual: the checksum of what was read; empty if the tar ends before all of the member.
    """

    failure = "data"

    def __init__(self, shard: str, clip: str, member: str, expected: str, actual: str):
        super().__init__(shard, clip, member, expected, actual)
        self.shard, self.clip, self.member, self.expected, self.actual = shard, clip, member, expected, actual

    def __str__(self) -> str:
        where = f"shard {self.shard}" + (f", clip {self.clip}" if self.clip else "") + f", member {self.member}"
        what = f"the bytes read have checksum {self.actual}, but they were written with {self.expected}"
        return (
            f"{where}: {what if self.actual else 'the tar ends before all of it'}; the file was damaged since: "
            "restore it from a copy, or delete it and prepare the dataset again"
        )

    @property
    def advice(self) -> str:
        """What lets a run go on; nothing does where an index is damaged."""
        without = "; data.on_corrupt=quarantine trains without damaged clips, and scores none" if self.clip else ""
        return f"mend it, then the same command{without}"


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest keeps of a shard: clips, bytes of the tar, and the hashes of tar and index."""

    clips: int
    bytes: int
    tar: str
    index: str


def shard_name(split: str, number: int) -> str:
    """The name of a shard; its files are `<name>.tar` and `<name>.index.npy`."""
    return f"{split}/{number:06d}"


def members(arrays: Iterable[str]) -> tuple[str, ...]:
    """The members of every clip in their fixed order: the named arrays of each person, then the JSON."""
    names = sorted(arrays)
    if bad := [name for name in names if not ARRAY.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} cannot name an array of a shard: use 1 to 13 letters, digits, '_' or '-'")
    return (*(f"{person}.{name}.npy" for person in PERSONS for name in names), "json")


def index_dtype(count: int) -> np.dtype:
    """An index row for clips of `count` members."""
    return np.dtype([("key", "S80"), ("offset", "<u8", (count,)), ("size", "<u8", (count,)), ("crc", "<u4", (count,))])


def write_shard(path: Path, clips: Iterable[Clip], arrays: Iterable[str]) -> ShardInfo:
    """Write a tar at this local path and its index beside it; the same clips give the same bytes on any machine.

    Args:
        path: ends in `.tar`.
        clips: in the order they will have.
        arrays: names that every person must have, no more and no less.

    Raises:
        ValueError: for a key or an array that cannot be written, naming the clip.
    """
    order = members(arrays)
    rows: list[tuple[bytes, list[int], list[int], list[int]]] = []
    import webdataset  # where tars are written

    with open(path, "wb") as file, webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for clip in clips:
            content = _encode(clip, order)
            position = writer.tarstream.offset
            writer.write({"__key__": clip.key} | content)
            offsets, sizes = [], [len(content[name]) for name in order]
            for size in sizes:
                offsets.append(position + BLOCK)
                position += BLOCK + -(-size // BLOCK) * BLOCK
            assert position == writer.tarstream.offset, "the members lie one after the other, in our order"
            rows.append((clip.key.encode(), offsets, sizes, [crc32c(content[name]) for name in order]))
    if len({row[0] for row in rows}) != len(rows):
        raise ValueError(f"{path}: two clips of one shard have the same key")
    index = encode_npy(np.array(rows, dtype=index_dtype(len(order))))
    path.with_suffix(".index.npy").write_bytes(index)
    with open(path, "rb") as written:
        tar = hashlib.file_digest(written, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return ShardInfo(len(rows), path.stat().st_size, tar, content_hash(index))


def upload_shard(store: Store, name: str, clips: Iterable[Clip], arrays: Iterable[str], hashed: bool = False) -> ShardInfo:
    """Write a shard in a scratch folder of this machine, then put it into the store; the same clips give the same bytes.

    Args:
        store: the dataset.
        name: of the shard, `<split>/<number>`.
        clips: in the order they will have. An error that is raised while they are made leaves nothing of the shard in the store.
        arrays: names that every person must have, no more and no less.
        hashed: whether it gets its `hashed_name`, so that other bytes never take its place.

    Raises:
        ValueError: as `write_shard`.
        StorageError: if it cannot be written.
    """
    with scratch_folder() as folder:
        path = folder / "shard.tar"
        info = write_shard(path, clips, arrays)
        name = hashed_name(name, info) if hashed else name
        store.put_file(f"{name}.tar", path)
        store.put_file(f"{name}.index.npy", path.with_suffix(".index.npy"))
    return info


def hashed_name(name: str, info: ShardInfo) -> str:
    """The name of a shard that carries its hash; the index is a function of the tar, so that one stands for both."""
    return f"{name}-{info.tar}"


def _encode(clip: Clip, order: Sequence[str]) -> dict[str, bytes]:
    if not KEY.fullmatch(clip.key):
        raise ValueError(f"clip key {clip.key!r} is not 1 to 80 letters, digits, '_' or '-'")
    content = {f"{person}.{name}.npy": encode_npy(array) for person, arrays in clip.people.items() for name, array in arrays.items()}
    content["json"] = json.dumps(clip.meta, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if set(content) != set(order):
        raise ValueError(f"clip {clip.key} has the members {', '.join(sorted(content))}, but this dataset's are {', '.join(order)}")
    return content


def encode_npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_npy(buffer: bytes | memoryview) -> np.ndarray:
    """The array of a .npy file in memory, without a copy; as writable as the buffer.

    Raises:
        ValueError: if the bytes are not one whole .npy file of plain numbers.
    """
    view = memoryview(buffer)
    if bytes(view[:8]) != NPY:
        raise ValueError("the bytes are no .npy file of version 1.0")
    end = 10 + int.from_bytes(view[8:10], "little")
    if len(view) < end:
        raise ValueError(f"the .npy file has {len(view)} bytes and ends inside its header of {end}")
    shape, dtype = npy_header(bytes(view[:end]))
    if len(view) != (size := end + dtype.itemsize * math.prod(shape)):
        raise ValueError(f"the .npy file has {len(view)} bytes, but an array {shape} of {dtype} needs {size}")
    return np.frombuffer(view[end:], dtype).reshape(shape)


@lru_cache(maxsize=1024)
def npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype in the header of a .npy file, which is all its bytes before the array; a dataset has only a few different ones.

    Raises:
        ValueError: if they are no header, or not one of plain numbers in C order.
    """
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or dtype.hasobject:
        raise ValueError(f"the .npy file holds {dtype}{' in Fortran order' if fortran else ''}; only plain numbers in C order are read")
    if file.tell() != len(header):
        raise ValueError(f"the .npy file's header ends after {file.tell()} bytes, but its array begins at {len(header)}")
    return shape, dtype


def read_index(store: Store, name: str, digest: str = "") -> np.ndarray:
    """The index of a shard: one row per clip with `key`, and `offset`, `size`, `crc` of each member.

    Args:
        store: the dataset.
        name: of the shard, `<split>/<number>`.
        digest: hash that the manifest has of it; empty: not compared.

    Raises:
        CorruptData: if the file is not the one of this hash.
    """
    key = f"{name}.index.npy"
    try:
        return decode_npy(read_verified(store, key, digest) if digest else store.read(key))
    except HashMismatch as error:
        raise CorruptData(name, "", "index", digest, error.actual) from None


def stock(urls: Sequence[str], buffer: int) -> Any:
    """Stock webdataset over tars, as its manual has it: shuffled and decoded samples. What our stream is measured against.

    Args:
        urls: of the tars, `pipe:` included.
        buffer: samples that are shuffled among each other.
    """
    import webdataset

    return webdataset.WebDataset(list(urls), shardshuffle=len(urls)).shuffle(buffer).decode()
