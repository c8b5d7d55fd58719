"""Shards on this node's disk, for all its ranks and runs: what was read from the store once is not sent over the wire again.

A shard is named by the hash of its tar, so nothing here is ever out of date; and the store has all of it, so anything here may
be deleted at any time. One sparse file a shard: first a map with one byte for each 512 bytes of the tar (its members begin at
multiples of 512, so no two share one), then the tar at its own offsets, as far as it was admitted. Bytes are written first and
marked second, so a process that is killed leaves nothing marked that is not there. A power cut may: whoever reads compares
checksums, as with the store, and drops what is wrong.

What a live process uses is never evicted; when there is no room, nothing more is admitted. No rule is better: between an item's
visits in two epochs lies the end of one, and what is hit after it was in the cache then, so at most the cache's share of the
data. What stays is hit just as often, and written once. Simulated, for room for 25, 50 and 75 % of 10 000 ranges in a new order
every epoch: hits are 25, 50 and 75 % here and for a clairvoyant (Belady), who rewrites 35, 35 and 22 % of the data in every
epoch; 3, 15 and 40 % where the least recently used is evicted. That rule is for what no live process uses: it makes room.

Locks are flocks, which the kernel releases with their process. Disk space is only allocated under one of them, so whoever holds
it may count the files at any time. The count kept beside them is marked while it changes: it is made again if its keeper was
killed over it.
"""

import fcntl
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from cluster.storage.base import content_hash

log = logging.getLogger(__name__)

UNIT = 512
"""Bytes that one byte of a map stands for."""

HEAD = 2 << 30
"""Where the tar begins in its file: after the map of a tar of up to 1 TiB. Ranges beyond that are not kept."""

SPARE = 1 / 20
"""Share of the file system that stays free, whatever the limit: logs and checkpoints go to the same disk."""

FILES = 256
"""Files a cache keeps open, last used first."""

TRIES = 30_000
"""How often the lock is tried, a millisecond apart, before nothing more is admitted: its holder may be suspended."""

HERE, SPACE = b"\1", b"\2"
"""Marks of a map: the bytes are here; there is only disk space for them. 0: neither."""

TAR = re.compile(r"[0-9a-f]{32}")
COUNT = struct.Struct("<q?")


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
        self._folder, self._root, self._limit = folder, str(folder), limit  # a Path takes microseconds to join
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "uses").mkdir(mode=0o700, exist_ok=True)
        self._count = _File(folder / "count", os.O_CREAT)
        self._block = os.statvfs(folder).f_frsize
        self._uses: list[_File] = []
        self._files = lru_cache(maxsize=FILES)(self._open)
        self._mutex = threading.Lock()
        self._admits = True
        self._full, self._refused = False, 0

    def use(self, tars: Iterable[str]) -> None:
        """From now on, and as long as this process lives, nothing of these shards is evicted.

        Args:
            tars: hashes of their tars, for example all of a manifest.
        """
        text = "\n".join(sorted(set(tars))).encode()
        with self._forgiving(), self._locked():
            live = self._live()
            name = content_hash(text)
            use = _File(self._folder / "uses" / name, os.O_CREAT)
            use.lock(fcntl.LOCK_SH)
            self._uses.append(use)
            if name not in live:
                use.write(0, text)
                self._write_count(self._recount())

    def close(self) -> None:
        """Let go of what was used here, and admit nothing more."""
        self._admits = False
        self._uses.clear()
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
        with self._forgiving():
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
        if start % UNIT or units.stop > HEAD or not self._admits:
            return False
        with self._forgiving():
            if b"\0" in marks and not (self._hopeful(length) and self._allocate(tar, units, length)):
                return False
            file = self._files(tar)
            if written := file.transfer(os.pwritev, HEAD + start, buffers):
                file.write(units.start, HERE * len(units))
            return written
        return False

    def drop(self, tar: str, start: int, length: int) -> None:
        """Forget a range that turned out wrong, so that it is read from the store; its disk space waits for the right bytes."""
        if self.holds(tar, start, length):
            with self._forgiving():
                units = _units(start, length)
                self._files(tar).write(units.start, SPACE * len(units))

    def _open(self, tar: str) -> "_File":
        file = _File(self._path(tar), 0)
        file.touch()  # the order of eviction; a file system may be mounted without access times
        return file

    def _path(self, tar: str) -> str:
        if not TAR.fullmatch(tar):
            raise ValueError(f"{tar!r} is no content hash of a tar: 32 hexadecimal digits")
        return f"{self._root}/{tar}"

    def _marks(self, tar: str, units: range) -> bytes:
        try:
            found = self._files(tar).read(units.start, len(units)) if units.stop <= HEAD else b""
        except OSError:
            found = b""
        return found.ljust(len(units), b"\0")

    def _hopeful(self, length: int) -> bool:
        """Whether room is worth a look: a full cache looks again whenever it has refused another eighth of its limit."""
        if not self._full or self._read_count()[0] + length <= self._limit:
            return True
        self._refused += length
        return self._refused >= self._limit // 8

    def _allocate(self, tar: str, units: range, length: int) -> bool:
        """Get disk space for these units and their marks, if there is room."""
        with self._locked():
            used = self._settled()
            need = self._blocks(length) + self._blocks(len(units)) + 4 * self._block  # the last for the file system's own tree
            if not self._fits(used, need):
                used = self._evict(used, need)
            self._full, self._refused = not self._fits(used, need), 0
            if self._full:
                return False
            file = self._created(tar)
            before = file.status().st_blocks
            self._write_count(used, settled=False)
            try:
                file.allocate(units.start, len(units))
                file.allocate(HEAD + units.start * UNIT, length)
            finally:
                self._write_count(used + (file.status().st_blocks - before) * 512)
            file.write(units.start, self._marks(tar, units).replace(b"\0", SPACE))
            return True

    def _created(self, tar: str) -> "_File":
        with suppress(FileNotFoundError):
            if (file := self._files(tar)).status().st_nlink:
                return file
            self._files.cache_clear()  # evicted since it was opened
        _File(self._path(tar), os.O_CREAT)
        return self._files(tar)

    def _blocks(self, length: int) -> int:
        """Most disk space that a range of this length can touch."""
        return (length // self._block + 2) * self._block

    def _fits(self, used: int, need: int) -> bool:
        disk = os.statvfs(self._root)
        return used + need <= self._limit and disk.f_bavail * disk.f_frsize - need >= SPARE * disk.f_blocks * disk.f_frsize

    def _evict(self, used: int, need: int) -> int:
        """Delete what no live process uses until there is room, and some to spare: each look at all files should pay."""
        kept = {tar for tars in self._live().values() for tar in tars}
        with os.scandir(self._folder) as entries:
            dead = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if TAR.fullmatch(entry.name) and entry.name not in kept]
        self._write_count(used, settled=False)
        for _, tar in sorted(dead):
            if self._fits(used, max(need, self._limit // 64)):
                break
            used -= os.stat(self._folder / tar).st_blocks * 512
            os.unlink(self._folder / tar)
        self._write_count(used)
        return used

    def _live(self) -> dict[str, list[str]]:
        """What live processes use: the tars of each list that one of them holds locked. Lists of the dead are deleted."""
        live = {}
        for name in os.listdir(self._folder / "uses"):
            use = _File(self._folder / "uses" / name, 0)
            try:
                use.lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                live[name] = (self._folder / "uses" / name).read_text().split()
            else:
                os.unlink(self._folder / "uses" / name)
        return live

    def _settled(self) -> int:
        used, settled = self._read_count()
        return used if settled else self._recount()

    def _recount(self) -> int:
        self._write_count(0, settled=False)  # the count, too, is a file with disk space
        folders = (self._folder, self._folder / "uses")
        return sum(entry.stat().st_blocks * 512 for folder in folders for entry in os.scandir(folder) if entry.is_file())

    def _read_count(self) -> tuple[int, bool]:
        data = self._count.read(0, COUNT.size)
        return COUNT.unpack(data) if len(data) == COUNT.size else (0, False)

    def _write_count(self, used: int, settled: bool = True) -> None:
        self._count.write(0, COUNT.pack(used, settled))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            for _ in range(TRIES if self._admits else 1):
                try:
                    self._count.lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.001)
            else:
                raise TimeoutError("another process does not give back the lock of the cache (is it suspended?)")
            try:
                yield
            finally:
                self._count.lock(fcntl.LOCK_UN)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """An error of the disk ends admission, not the run."""
        try:
            yield
        except OSError as error:
            if self._admits:
                self._admits = False
                log.warning("%s: %s; this process keeps nothing more on this node's disk", self._folder, error.strerror or error)


class _File:
    """An open file, closed when the last thread that uses it lets go: the descriptor stays in here, where nobody outlives it."""

    def __init__(self, path: str | Path, flags: int):
        self._descriptor = os.open(path, os.O_RDWR | flags, 0o600)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._descriptor, data, offset)

    def transfer(self, call: Callable[[int, Sequence[memoryview], int], int], offset: int, buffers: Iterable[memoryview]) -> bool:
        """`os.preadv` or `os.pwritev` until all buffers are through; whether they are."""
        rest = [buffer for buffer in buffers if len(buffer)]
        while rest:
            if not (count := call(self._descriptor, rest[:1024], offset)):
                return False
            offset += count
            done = 0
            while done < len(rest) and count >= len(rest[done]):
                count -= len(rest[done])
                done += 1
            del rest[:done]
            if count:
                rest[0] = rest[0][count:]
        return True

    def allocate(self, offset: int, length: int) -> None:
        os.posix_fallocate(self._descriptor, offset, length)

    def status(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    def lock(self, operation: int) -> None:
        fcntl.flock(self._descriptor, operation)

    def touch(self) -> None:
        os.utime(self._descriptor)


def _units(start: int, length: int) -> range:
    """The units that a range touches. The end of its last member's unit is padding, which nobody reads."""
    return range(start // UNIT, -(-(start + length) // UNIT))
