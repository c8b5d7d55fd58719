"""Shards on this node's disk, for all its ranks and runs: what was read from the store once is not sent over the wire again.

A shard is named by the hash of its tar, so nothing here is ever out of date; and the store has all of it, so anything here may
be deleted at any time. One sparse file a shard: first a map with one byte for each 512 bytes of the tar (its members begin at
multiples of 512, so no two share one), then the tar at its own offsets, as far as it was admitted:

  offset                0                 HEAD (2 GiB)
  file of a tar         | map: 1 1 0 2 .. | tar: bytes 0 to 511 | 512 to 1023 | (hole) | allocated | ..
  mark of the 512 bytes                           1                   1            0         2

Bytes are written first and marked second, so a process that is killed leaves nothing marked that is not there. A power cut may:
readers compare checksums, as with the store, and drop what is wrong.

How much disk space there is for this, and what is evicted: `cluster/data/cache_space.py`.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cluster.data.cache_file import CacheFile
from cluster.data.cache_space import TAR, CacheSpace

UNIT = 512
"""Bytes that one byte of a map stands for."""

HEAD = 2 << 30
"""Where the tar begins in its file: after the map of a tar of up to 1 TiB. Ranges beyond that are not kept."""

FILES = 256
"""Files a cache keeps open, last used first."""

HERE, SPACE = b"\1", b"\2"
"""Marks of a map: the bytes are here; there is only disk space for them. 0: neither."""


class Cache:
    """Bytes of shards on this node's disk, shared by all its ranks and runs; safe to use from several threads.

    Neither a full disk nor a broken one stops a run: it is warned of once, nothing more is admitted, and what cannot be read is
    not there. The disk space is known exactly where a file system allocates when it is asked to (ext4, XFS, btrfs, tmpfs); on
    ZFS, which allocates later, the limit is only approached.

    Args:
        folder: created if it is not there, for this user alone.
        limit: most bytes of disk space of the folder, of all runs together. A twentieth of the file system is left free, too.

    Raises:
        OSError: if the folder cannot be created or opened.
    """

    def __init__(self, folder: Path, limit: int):
        self._root = str(folder)  # a Path takes microseconds to join
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._space = CacheSpace(folder, limit)
        self._files = lru_cache(maxsize=FILES)(self._open)

    def use(self, tars: Iterable[str]) -> None:
        """From now on, and as long as this process lives, nothing of these shards is evicted.

        Args:
            tars: hashes of their tars, for example all of a manifest.
        """
        self._space.use(tars)

    def close(self) -> None:
        """What was used here may be evicted again; nothing more is admitted."""
        self._space.close()
        self._files.cache_clear()

    def holds(self, tar: str, start: int, length: int) -> bool:
        """Whether this range of a tar is wholly here; costs a few microseconds."""
        units = _units(start, length)
        return length > 0 and self._marks(tar, units) == HERE * len(units)

    def read_into(self, tar: str, start: int, *buffers: memoryview) -> bool:
        """Fill writable buffers, one after the other, with a tar's content from byte `start` on.

        The caller compares checksums: the disk may have changed what it was given.

        Returns:
            Whether the range was wholly here; if not, the buffers hold nothing of use.
        """
        if not self.holds(tar, start, sum(map(len, buffers))):
            return False
        with self._space.errors_end_admission():
            return self._files(tar).transfer(os.preadv, HEAD + start, buffers)
        return False

    def admit(self, tar: str, start: int, *buffers: memoryview) -> bool:
        """Keep a range of a tar that was read from the store, if there is room.

        Args:
            tar: hash of the tar.
            start: where the range begins, at a member; it ends where a member does.
            buffers: its bytes, one after the other.

        Returns:
            Whether the range is here now.
        """
        length = sum(map(len, buffers))
        units = _units(start, length)
        marks = self._marks(tar, units)
        if marks == HERE * len(units):
            return True
        if start % UNIT or units.stop > HEAD or not self._space.admits:
            return False
        with self._space.errors_end_admission():
            if b"\0" in marks and not (self._space.may_have_room(length) and self._allocate(tar, units, length)):
                return False
            file = self._files(tar)
            if written := file.transfer(os.pwritev, HEAD + start, buffers):
                file.write(units.start, HERE * len(units))
            return written
        return False

    def drop(self, tar: str, start: int, length: int) -> None:
        """Unmark a range whose bytes are wrong, so that it is read from the store; it keeps its disk space for the right bytes."""
        if self.holds(tar, start, length):
            with self._space.errors_end_admission():
                units = _units(start, length)
                self._files(tar).write(units.start, SPACE * len(units))

    def _open(self, tar: str) -> CacheFile:
        file = CacheFile(self._path(tar), 0)
        file.touch()  # the order of eviction; a file system may be mounted without access times
        return file

    def _path(self, tar: str) -> str:
        if not TAR.fullmatch(tar):
            raise ValueError(f"{tar!r} is no content hash of a tar: 32 hexadecimal digits")
        return f"{self._root}/{tar}"

    def _marks(self, tar: str, units: range) -> bytes:
        try:
            marks = self._files(tar).read(units.start, len(units)) if units.stop <= HEAD else b""
        except OSError:
            marks = b""
        return marks.ljust(len(units), b"\0")

    def _allocate(self, tar: str, units: range, length: int) -> bool:
        """Get disk space for these units and their marks, if there is room."""
        with self._space.lock():
            if (used := self._space.make_room(length, len(units))) is None:
                return False
            file = self._open_or_create(tar)
            with self._space.allocation(file, used):
                file.allocate(units.start, len(units))
                file.allocate(HEAD + units.start * UNIT, length)
            file.write(units.start, self._marks(tar, units).replace(b"\0", SPACE))
            return True

    def _open_or_create(self, tar: str) -> CacheFile:
        with suppress(FileNotFoundError):
            if not (file := self._files(tar)).deleted():
                return file
            self._files.cache_clear()  # evicted since it was opened
        CacheFile(self._path(tar), os.O_CREAT)
        return self._files(tar)


def _units(start: int, length: int) -> range:
    """The units that a range touches. The end of its last member's unit is padding, which is never read."""
    return range(start // UNIT, -(-(start + length) // UNIT))
