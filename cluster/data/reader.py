"""Clips of one split by number: which shard, which bytes, compared with their checksums, and as arrays where they are wanted.

A read has three steps. Here arrays a to d are in one shard, e in the next, and c is in the cache of this node:

  tars     shard 0 |.aaabbb.ccc.....................ddd.|  shard 1 |.....eee.|
  plan               0  1   2                       3                    4      one entry for each array
  ranges             [0,2)  [2,3)                   [3,4)                [4,5)  entries of each range: neighbours are coalesced
  fetch              store  cache                   store                store  one range: ReceiveBuffers, checksums, places

Several threads may fetch different ranges of one plan at the same time.
"""

import difflib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from cluster.data.cache import Cache
from cluster.data.checksums import RunningChecksums
from cluster.data.manifest import Manifest
from cluster.data.ranges import Range, ReadPlan, ReceiveBuffers
from cluster.data.shards import CorruptData, index_dtype, npy_header, read_index
from cluster.storage import BeyondEnd, Store
from cluster.storage.parallel import parallel_map

log = logging.getLogger(__name__)

ArrayKey = tuple[str, str]
"""(person, array name)."""

INDICES = 64 << 20
"""Bytes of indices that a reader keeps, newest use first."""

NEAR = 10_000
"""Keys that an unknown key is compared with, at most: that takes a second or two."""


@dataclass(frozen=True)
class ReadResult:
    """Arrays of a clip, the bytes fetched for them, and the sum of their members' CRC32C."""

    arrays: dict[ArrayKey, np.ndarray]
    bytes: int
    checksum: int


class FetchResult(NamedTuple):
    """What came of a range.

    Attributes:
        damaged: for each entry of the plan whose bytes are not those that were written, or are beyond the end of the tar, the error; its
            place holds nothing of use.
        bytes: asked of the store.
    """

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
        largest = int(self.counts.max(initial=1)) * index_dtype(len(manifest.members)).itemsize
        self._index = lru_cache(maxsize=max(1, INDICES // largest))(self._read_index)
        self._members = {name: number for number, name in enumerate(manifest.members)}
        self._headers: set[tuple[int, bytes]] = set()
        if cache:
            cache.use(self._tar(shard) for shard in range(len(self.counts)))

    @property
    def clips(self) -> int:
        """Clips of the split."""
        return int(self._first[-1])

    def key(self, clip: int) -> str:
        """A clip's key."""
        return self._key(*self._locate(clip))

    def named(self, clip: int) -> str:
        """A clip's shard and key, for people."""
        shard, row = self._locate(clip)
        return f"shard {self._name(shard)}, clip {self._key(shard, row)}"

    def keys(self) -> Iterator[np.ndarray]:
        """The keys of each shard's clips, (clips,) bytes, shard by shard; reads every index, several at the same time."""
        return parallel_map(lambda shard: self._index(shard)["key"].copy(), range(len(self.counts)))

    def find_clip(self, key: str) -> int | None:
        """The number of the clip with this key, None if the split has none; reads the indices as far as there."""
        for first, keys in zip(self._first[:-1], self.keys(), strict=True):
            if (rows := np.flatnonzero(keys == key.encode())).size:
                return int(first + rows[0])
        return None

    def clip_number(self, key: str) -> int:
        """The number of the clip with this key.

        Raises:
            ValueError: if the split has none, with the nearest ones among its first 10 000.
        """
        if (clip := self.find_clip(key)) is None:
            keys = [known.decode() for known in islice(chain.from_iterable(map(np.ndarray.tolist, self.keys())), NEAR)]
            near = difflib.get_close_matches(key, keys, cutoff=0)
            among = f" of the first {len(keys)}" if len(keys) < self.clips else ""
            raise ValueError(
                f"none of the {self.clips} clips of split {self._split} has the key {key!r}; "
                f"the nearest{among}: {', '.join(near)} (or choose --split)"
            )
        return clip

    def array(self, source: ArrayKey) -> tuple[tuple[int, int], np.dtype]:
        """Shape (frames, width) and dtype of an array in every clip.

        Raises:
            ValueError: if the dataset has none of this name.
        """
        self.member(source)
        widths = {stream.name: stream.width for stream in self._manifest.streams} | self._manifest.targets
        dtype = np.float32 if source[1] in self._manifest.targets else self._manifest.dtype
        return (self._manifest.frames, widths[source[1]]), np.dtype(dtype)

    def read(self, clip: int, wanted: Collection[ArrayKey]) -> ReadResult:
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
        members = np.array([[self.member(source) for source in arrays]], dtype=np.int64)
        plan = self.plan(np.array([clip]), members, [array[None] for array in arrays.values()])
        ranges = self.ranges(plan)
        for span in ranges:
            for error in self.fetch(plan, span).damaged.values():
                raise error
        return ReadResult(arrays, sum(span.length for span in ranges), sum(plan.crc))

    def member(self, source: ArrayKey) -> int:
        """The number of an array's member in the manifest.

        Raises:
            ValueError: if the dataset has none of this name.
        """
        name = f"{source[0]}.{source[1]}.npy"
        if name not in self._members:
            raise ValueError(f"the dataset has no member {name}; it has {', '.join(self._members)}")
        return self._members[name]

    def plan(
        self,
        clips: np.ndarray,
        members: np.ndarray,
        places: Sequence[np.ndarray],
        rows: np.ndarray | None = None,
        map_indices: Callable[..., Any] = map,
    ) -> ReadPlan:
        """Where the bytes of arrays are in the store, and where the arrays go.

        Args:
            clips: (n,) clips in the split.
            members: (n, kinds) the members of each that are wanted.
            places: of each kind, the array (rows, frames, width) that they go to, in C order.
            rows: (n,) the row of each clip there; in their order where it is not given.
            map_indices: like `map`, to read the indices of several shards at the same time.

        Raises:
            CorruptData: if an index is damaged.
            StorageError: if one cannot be read.
        """
        shards = np.searchsorted(self._first, clips, side="right") - 1
        by_shard = np.argsort(shards, kind="stable")
        unique, begins = np.unique(shards[by_shard], return_index=True)
        columns = {name: np.empty(members.shape, dtype=np.int64) for name in ("offset", "size", "crc")}
        for index, entries in zip(map_indices(self._index, unique.tolist()), np.split(by_shard, begins[1:]), strict=True):
            clip = (clips[entries] - self._first[shards[entries]])[:, None]
            for name, column in columns.items():
                column[entries] = index[name][clip, members[entries]]
        numbers = (np.arange(len(clips)) if rows is None else rows)[:, None]
        wide = [numbers, np.arange(members.shape[1]), shards[:, None], (clips - self._first[shards])[:, None], members, *columns.values()]
        flat = [np.broadcast_to(column, members.shape).ravel() for column in wide]
        order = np.lexsort((flat[5], flat[2]))
        places_as_bytes = [memoryview(place.data).cast("B") for place in places]
        return ReadPlan(places_as_bytes, [place[0].nbytes for place in places], *(column[order].tolist() for column in flat))

    def ranges(self, plan: ReadPlan) -> list[Range]:
        """As few ranged reads as it takes; a range is wholly in the cache, with the gaps in it, or none of its entries is."""
        if (cache := self._cache) is None:
            return plan.coalesce()
        tars = {shard: self._tar(shard) for shard in set(plan.shard)}
        cached = [cache.holds(tars[s], o, n) for s, o, n in zip(plan.shard, plan.offset, plan.size, strict=True)]
        ranges: list[Range] = []
        for span in plan.coalesce(cached):
            whole = not cached[span.first] or cache.holds(tars[span.shard], span.start, span.length)
            ranges += [span] if whole else plan.single(span)
        return ranges

    def fetch(self, plan: ReadPlan, span: Range, keep: bool = True) -> FetchResult:
        """Read a range and put its arrays in their places; bytes that do not match their checksum, or do not come, are read once more.

        Args:
            plan: of `plan`.
            span: of `ranges`.
            keep: whether it will be wanted again, so that the cache should keep it.

        Raises:
            StorageError: if the range cannot be read.
        """
        target, name, tar = ReceiveBuffers(plan, span), self._name(span.shard), self._tar(span.shard)
        if self._cache and self._cache.read_into(tar, span.start, *target.buffers):
            sums = RunningChecksums(target)
            for buffer in target.buffers:
                sums.update(buffer)
            if not self._place(plan, span, target, sums.of):
                return FetchResult({}, 0)
            log.warning("%s: the cache on this node's disk differs from what was kept there; reading it again", name)
            self._cache.drop(tar, span.start, span.length)
        for reads in (1, 2):  # bytes can also be damaged on their way
            sums = RunningChecksums(target)
            try:
                self._store.read_into(f"{name}.tar", span.start, *target.buffers, on_bytes=sums.update)
            except BeyondEnd as error:
                if reads == 2:
                    return self._fetch_apart(plan, span, keep)
                log.warning("%s; reading it once more", error)
                continue
            damaged = self._place(plan, span, target, sums.of)
            if not damaged:
                break
            if reads == 1:
                log.warning("%s; reading it once more", next(iter(damaged.values())))
        if self._cache and keep and not damaged:
            self._cache.admit(tar, span.start, *target.buffers)
        return FetchResult(damaged, reads * span.length)

    def _fetch_apart(self, plan: ReadPlan, span: Range, keep: bool) -> FetchResult:
        """Read each member of a range that the tar ends before by itself: what was coalesced must not decide which are damaged."""
        parts = plan.single(span)
        if len(parts) == 1:
            return FetchResult({number: self._corrupt(plan, number, None) for number in range(span.first, span.last)}, 0)
        results = [self.fetch(plan, part, keep) for part in parts]
        damaged = {number: found for result in results for number, found in result.damaged.items()}
        return FetchResult(damaged, sum(result.bytes for result in results))

    def _place(self, plan: ReadPlan, span: Range, target: ReceiveBuffers, sums: dict[int, int]) -> dict[int, CorruptData]:
        """Copy small arrays to their places and compare all checksums; returns the error of each entry that does not match.

        Args:
            plan: of `plan`.
            span: of `ranges`.
            target: where the range was received.
            sums: checksums of the entries that were received in their place.
        """
        damaged: dict[int, CorruptData] = {}
        scratch, headers, before, array = target.scratch, self._headers, -1, memoryview(b"")
        for number, at in zip(range(span.first, span.last), target.at, strict=True):
            place, size = plan.place(number), plan.size[number]
            body = at + size - len(place)
            if plan.offset[number] == before:  # the same array once more
                if number - 1 in damaged:
                    damaged[number] = damaged[number - 1]
                else:
                    place[:] = array
                continue
            before = plan.offset[number]
            if plan.direct(number):
                array, crc = place, sums[number]
            else:
                array, crc = scratch[body : at + size], crc32c(scratch[at : at + size])
                place[:] = array
            if crc != plan.crc[number]:
                damaged[number] = self._corrupt(plan, number, crc)
            elif (known := (plan.member[number], bytes(scratch[at:body]))) not in headers:
                self._assert_header(plan, number, known[1])
                headers.add(known)
        return damaged

    def _corrupt(self, plan: ReadPlan, number: int, crc: int | None) -> CorruptData:
        """The error of an entry whose bytes have this checksum, or are not there."""
        shard, member = plan.shard[number], self._manifest.members[plan.member[number]]
        actual = "" if crc is None else f"{crc:08x}"
        return CorruptData(self._name(shard), self._key(shard, plan.clip[number]), member, f"{plan.crc[number]:08x}", actual)

    def _assert_header(self, plan: ReadPlan, number: int, header: bytes) -> None:
        """Raise an error unless an array has the shape and type that the manifest says."""
        person, name, _ = self._manifest.members[plan.member[number]].split(".")
        shape, dtype = self.array((person, name))
        shard, clip = plan.shard[number], plan.clip[number]
        try:
            actual = "{1} {0}".format(*npy_header(header))
        except ValueError as error:
            actual = str(error)
        if actual != f"{dtype} {shape}":
            raise ValueError(
                f"shard {self._name(shard)}, clip {self._key(shard, clip)}, {person}.{name}.npy is not the {dtype} array {shape} "
                f"that the manifest says, but {actual}: prepare the dataset again"
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

    def _tar(self, shard: int) -> str:
        """The hash of a shard's tar."""
        return self._manifest.split(self._split).shards.info(shard).tar

    def _name(self, shard: int) -> str:
        return self._manifest.shard(self._split, shard)
