"""Clips of one split by number: which shard, which bytes, checked and decoded."""

import difflib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cluster.cache import Cache
from cluster.manifest import Manifest
from cluster.ranges import Layout, Piece, Range, Target, joined
from cluster.shards import CorruptData, npy_header, read_index
from cluster.storage import Store

log = logging.getLogger(__name__)

Source = tuple[str, str]
"""(person, array name)."""

INDICES = 128
"""Indices of shards a reader keeps, newest use first; one costs less than half a kilobyte a clip."""


@dataclass(frozen=True)
class Read:
    """What was read of a clip: arrays, the bytes fetched, and the sum of the members' CRC32C."""

    arrays: dict[Source, np.ndarray]
    bytes: int
    checksum: int


class Fetched(NamedTuple):
    """What came of a range: by offset, what is wrong with damaged pieces (their targets hold nothing of use); bytes asked of the store."""

    damaged: dict[int, CorruptData]
    bytes: int


class Reader:
    """Random access to the clips of a split; safe to use from several threads.

    Args:
        store: the dataset.
        manifest: its state.
        split: which split.
        cache: what was read before on this node, if there is one.

    Raises:
        ValueError: if the dataset has no such split.
    """

    def __init__(self, store: Store, manifest: Manifest, split: str, cache: Cache | None = None):
        self.counts = manifest.counts(split)
        self._store, self._manifest, self._split, self._cache = store, manifest, split, cache
        self._first = np.concatenate(([0], np.cumsum(self.counts)))
        self._index = lru_cache(maxsize=INDICES)(self._read_index)
        self._members = {name: number for number, name in enumerate(manifest.members)}
        self._headers: set[tuple[int, bytes]] = set()
        if cache:
            cache.use(manifest.split(split).shards.info(shard).tar for shard in range(len(self.counts)))

    @property
    def clips(self) -> int:
        """Clips of the split."""
        return int(self._first[-1])

    def key(self, clip: int) -> str:
        """A clip's key."""
        return self._key(*self._locate(clip))

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

    def array(self, source: Source) -> tuple[tuple[int, int], np.dtype]:
        """Shape (frames, width) and dtype of an array in every clip.

        Raises:
            ValueError: if the dataset has none of this name.
        """
        person, name = source
        widths = {stream.name: stream.width for stream in self._manifest.streams} | self._manifest.targets
        if f"{person}.{name}.npy" not in self._members:
            raise ValueError(f"the dataset has no member {person}.{name}.npy; it has {', '.join(self._members)}")
        return (self._manifest.frames, widths[name]), np.dtype(np.float32 if name in self._manifest.targets else self._manifest.dtype)

    def read(self, clip: int, wanted: Collection[Source]) -> Read:
        """Arrays of a clip.

        Args:
            clip: its number in the split.
            wanted: (person, array name) of each array.

        Raises:
            CorruptData: if a member's bytes are not those that were written.
            StorageError: if they cannot be read.
        """
        self._locate(clip)
        arrays = {source: np.empty(*self.array(source)) for source in wanted}
        targets = [Target(memoryview(array.data).cast("B")) for array in arrays.values()]
        ranges = self.plan(np.full(len(arrays), clip), list(arrays), targets)
        for part in ranges:
            for error in self.fetch(part).damaged.values():
                raise error
        return Read(arrays, sum(part.length for part in ranges), sum(piece.crc for part in ranges for piece in part.pieces))

    def plan(self, clips: np.ndarray, sources: Sequence[Source], targets: Sequence[Target], each: Callable[..., Any] = map) -> list[Range]:
        """As few ranged reads as it takes to fill all targets, none of more than is wanted and small gaps.

        Args:
            clips: (n,) the clip of each array.
            sources: (n) which array of it.
            targets: (n) where it goes: as many bytes as the array has.
            each: like `map`, to read the indices of several shards at the same time.

        Raises:
            CorruptData: if an index is damaged.
            StorageError: if one cannot be read.
        """
        shards = np.searchsorted(self._first, clips, side="right") - 1
        rows = clips - self._first[shards]
        places = np.array([self._members[f"{person}.{name}.npy"] for person, name in sources], dtype=np.int64)
        unique = np.unique(shards).tolist()
        ranges = []
        for shard, index in zip(unique, each(self._index, unique), strict=True):
            mine = np.flatnonzero(shards == shard)
            row, place = rows[mine], places[mine]
            columns = [index[name][row, place] for name in ("offset", "size", "crc")]
            by_offset = np.argsort(columns[0], kind="stable")
            pieces: list[Piece] = []
            fields = [column[by_offset].tolist() for column in (mine, row, place, *columns)]
            for at, clip, member, offset, size, crc in zip(*fields, strict=True):
                piece = Piece(clip, member, offset, size, crc, [targets[at]])
                if pieces and pieces[-1].offset == piece.offset:
                    pieces[-1].targets.append(targets[at])
                else:
                    pieces.append(piece)
            ranges += self._joined(shard, pieces)
        return ranges

    def fetch(self, part: Range, keep: bool = True) -> Fetched:
        """Read a range and fill its targets; what does not match its checksum is read once more: bytes also change on their way.

        Args:
            part: of `plan`.
            keep: whether it will be wanted again, so that the cache should keep it.

        Raises:
            StorageError: if the range cannot be read.
        """
        layout, tar = Layout(part), self._manifest.split(self._split).shards.info(part.shard).tar
        if self._cache and self._cache.read_into(tar, part.start, *layout.buffers):
            if not self._damaged(layout):
                layout.deliver()
                return Fetched({}, 0)
            log.warning("%s: the cache on this node's disk differs from what was kept there; reading it again", self._name(part.shard))
            self._cache.drop(tar, part.start, part.length)
        for reads in (1, 2):
            self._store.read_into(f"{self._name(part.shard)}.tar", part.start, *layout.buffers)
            damaged = self._damaged(layout)
            if not damaged:
                break
            if reads == 1:
                log.warning("%s; reading it once more", next(iter(damaged.values())))
        if self._cache and keep and not damaged:
            self._cache.admit(tar, part.start, *layout.buffers)
        layout.deliver()
        return Fetched(damaged, reads * part.length)

    def _joined(self, shard: int, pieces: list[Piece]) -> list[Range]:
        """What is in the cache is not joined with what is not, nor over a gap that is not there."""
        if (cache := self._cache) is None:
            return joined(shard, pieces)
        tar = self._manifest.split(self._split).shards.info(shard).tar
        held = {piece.offset for piece in pieces if cache.holds(tar, piece.offset, piece.size)}
        ranges = joined(shard, (piece for piece in pieces if piece.offset not in held))
        for part in joined(shard, (piece for piece in pieces if piece.offset in held)):
            ranges += [part] if cache.holds(tar, part.start, part.length) else [Range(shard, [piece]) for piece in part.pieces]
        return ranges

    def _damaged(self, layout: Layout) -> dict[int, CorruptData]:
        """By offset, the pieces of a filled layout whose bytes are not those that were written."""
        damaged = {}
        for piece, header, crc in layout.landed():
            if crc != piece.crc:
                shard, member = layout.part.shard, self._manifest.members[piece.member]
                key = self._key(shard, piece.row)
                damaged[piece.offset] = CorruptData(self._name(shard), key, member, f"{piece.crc:08x}", f"{crc:08x}")
            elif (known := (piece.member, bytes(header))) not in self._headers:
                self._assert_header(layout.part.shard, piece, known[1])
                self._headers.add(known)
        return damaged

    def _assert_header(self, shard: int, piece: Piece, header: bytes) -> None:
        """An array is of the shape and type that the manifest says."""
        person, name, _ = self._manifest.members[piece.member].split(".")
        shape, dtype = self.array((person, name))
        try:
            found = "{1} {0}".format(*npy_header(header))
        except ValueError as error:
            found = str(error)
        if found != f"{dtype} {shape}":
            raise ValueError(
                f"shard {self._name(shard)}, clip {self._key(shard, piece.row)}, {person}.{name}.npy is not the {dtype} array {shape} "
                f"that the manifest says, but {found}: prepare the dataset again"
            )

    def _locate(self, clip: int) -> tuple[int, int]:
        if not 0 <= clip < self.clips:
            raise IndexError(f"split {self._split} has clips 0 to {self.clips - 1}, not {clip}")
        shard = int(np.searchsorted(self._first, clip, side="right")) - 1
        return shard, clip - int(self._first[shard])

    def _read_index(self, shard: int) -> np.ndarray:
        info = self._manifest.split(self._split).shards.info(shard)
        return read_index(self._store, self._name(shard), info.index)

    def _key(self, shard: int, row: int) -> str:
        return bytes(self._index(shard)[row]["key"]).decode()

    def _name(self, shard: int) -> str:
        return self._manifest.shard(self._split, shard)
