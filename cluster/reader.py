"""Clips of one split by number: which shard, which bytes, checked and decoded."""

import difflib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cluster.manifest import Manifest
from cluster.shards import CorruptData, Piece, Span, decode_npy, read_index, span, verify
from cluster.storage import Store

log = logging.getLogger(__name__)

Source = tuple[str, str]
"""(person, array name)."""

INDICES = 64
"""Indices of shards a reader keeps, newest use first; one costs about a kilobyte a clip."""


@dataclass(frozen=True)
class Read:
    """What was read of a clip: arrays, the bytes fetched, and the sum of the members' CRC32C."""

    arrays: dict[Source, np.ndarray]
    bytes: int
    checksum: int


class Reader:
    """Random access to the clips of a split; safe to use from several threads.

    Args:
        store: the dataset.
        manifest: its state.
        split: which split.

    Raises:
        ValueError: if the dataset has no such split.
    """

    def __init__(self, store: Store, manifest: Manifest, split: str):
        self.counts = manifest.counts(split)
        self._store, self._manifest, self._split = store, manifest, split
        self._first = np.concatenate(([0], np.cumsum(self.counts)))
        self._index = lru_cache(maxsize=INDICES)(self._read_index)

    @property
    def clips(self) -> int:
        """Clips of the split."""
        return int(self._first[-1])

    def key(self, clip: int) -> str:
        """A clip's key."""
        shard, row = self._locate(clip)
        return bytes(self._index(shard)[row]["key"]).decode()

    def find(self, key: str) -> int | None:
        """The number of the clip with this key, None if the split has none; reads every index."""
        for shard in range(len(self.counts)):
            found = np.flatnonzero(self._index(shard)["key"] == key.encode())
            if found.size:
                return int(self._first[shard] + found[0])
        return None

    def number(self, key: str) -> int:
        """The number of the clip with this key.

        Raises:
            ValueError: if the split has none, with the nearest ones.
        """
        if (clip := self.find(key)) is None:
            keys = [self.key(number) for number in range(self.clips)]
            near = difflib.get_close_matches(key, keys, cutoff=0)
            raise ValueError(
                f"none of the {len(keys)} clips of split {self._split} has the key {key!r}; "
                f"the nearest: {', '.join(near)} (or choose --split)"
            )
        return clip

    def read(self, clip: int, wanted: Collection[Source]) -> Read:
        """Arrays of a clip, one ranged read for each person.

        Args:
            clip: its number in the split.
            wanted: (person, array name) of each array.

        Raises:
            CorruptData: if a member's bytes are not those that were written.
            StorageError: if they cannot be read.
        """
        shard, row = self._locate(clip)
        name, entry = self._manifest.shard(self._split, shard), self._index(shard)[row]
        arrays, size, checksum = {}, 0, 0
        for person in sorted({person for person, _ in wanted}):
            members = {f"{p}.{array}.npy": (p, array) for p, array in wanted if p == person}
            part = span(entry, self._manifest.members, members)
            for piece, view in self._verified(name, bytes(entry["key"]).decode(), part):
                arrays[members[piece.member]] = decode_npy(view)
                checksum += piece.crc
            size += part.length
        return Read(arrays, size, checksum)

    def _verified(self, name: str, clip: str, part: Span) -> list[tuple[Piece, memoryview]]:
        """The members of one ranged read. What does not match is read once more: bytes also change on their way."""
        for again in (True, False):
            data = self._fetch(f"{name}.tar", part)
            found = [(piece, data[piece.start : piece.start + piece.size]) for piece in part.pieces]
            try:
                for piece, view in found:
                    verify(name, clip, piece, view)
            except CorruptData as error:
                if not again:
                    raise
                log.warning("%s; reading it once more", error)
            else:
                return found
        raise AssertionError("the second read returns or raises")

    def _fetch(self, key: str, part: Span) -> memoryview:
        data = memoryview(bytearray(part.length))
        self._store.read_into(key, part.start, data)
        return data

    def _locate(self, clip: int) -> tuple[int, int]:
        if not 0 <= clip < self.clips:
            raise IndexError(f"split {self._split} has clips 0 to {self.clips - 1}, not {clip}")
        shard = int(np.searchsorted(self._first, clip, side="right")) - 1
        return shard, clip - int(self._first[shard])

    def _read_index(self, shard: int) -> np.ndarray:
        info = self._manifest.split(self._split).shards.info(shard)
        return read_index(self._store, self._manifest.shard(self._split, shard), info.index)
