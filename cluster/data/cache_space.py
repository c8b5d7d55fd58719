"""The disk space of a node's cache: how much of it is used, how much it may be, and what is evicted to make room.

What a live process uses is never evicted; when there is no room, nothing more is admitted. No rule has more hits: between two
reads of an item an epoch ends, and what is hit after that was in the cache at the end of the epoch, so at most the cache's share of
the data. Without eviction just as much is hit, and each byte is written once. Simulated, with room for 25, 50 and 75 % of 10 000
ranges that are read in a new order every epoch: 25, 50 and 75 % are hits here and for the best rule that knows all future reads
(Belady), which writes 35, 35 and 22 % of the data anew in every epoch; 3, 15 and 40 % where the least recently used is evicted.
Least recently used first is the rule for what no live process uses: it is evicted when room is needed.

The folder has one file for each tar, named by its hash, and beside them:

  count     bytes of disk space of all files here, and whether they are up to date; its lock is the lock of the cache
  uses/     lists of tars, each locked by the processes that use these tars, for as long as they live

Locks are flocks, which the kernel releases with their process. Disk space is only allocated under the lock of the cache, so
its holder may count the files at any time. The count is marked while it changes: it is made again if a process was killed
meanwhile.
"""

import fcntl
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.data.cache_file import CacheFile
from cluster.storage.base import content_hash

log = logging.getLogger(__name__)

SPARE = 1 / 20
"""Share of the file system that stays free, whatever the limit: logs and checkpoints go to the same disk."""

TRIES = 30_000
"""How often the lock is tried, a millisecond apart, before nothing more is admitted: its holder may be suspended."""

TAR = re.compile(r"[0-9a-f]{32}")
"""Name of a tar's file: the hash of its content."""

COUNT = struct.Struct("<q?")
"""Content of the file `count`: bytes of disk space, and whether they are up to date."""


class CacheSpace:
    """The disk space of a cache's folder, shared by all processes of this node; safe to use from several threads.

    Args:
        folder: of the cache; it is there.
        limit: most bytes of disk space of the folder.

    Raises:
        OSError: if its files cannot be created or opened.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._root, self._limit = folder, str(folder), limit
        (folder / "uses").mkdir(mode=0o700, exist_ok=True)
        self._count = CacheFile(folder / "count", os.O_CREAT)
        self._block = os.statvfs(folder).f_frsize
        self._uses: list[CacheFile] = []
        self._mutex = threading.Lock()
        self._admits = True
        self._full, self._refused = False, 0

    @property
    def admits(self) -> bool:
        """Whether this process may still admit anything."""
        return self._admits

    def use(self, tars: Iterable[str]) -> None:
        """From now on, and as long as this process lives, these tars are not evicted."""
        text = "\n".join(sorted(set(tars))).encode()
        with self.errors_end_admission(), self.lock():
            live = self._live()
            name = content_hash(text)
            use = CacheFile(self._folder / "uses" / name, os.O_CREAT)
            use.lock(fcntl.LOCK_SH)
            self._uses.append(use)
            if name not in live:
                use.write(0, text)
                self._write_count(self._recount())

    def close(self) -> None:
        """Unlock the lists of this process, and admit nothing more."""
        self._admits = False
        self._uses.clear()

    def may_have_room(self, length: int) -> bool:
        """Whether to look for room, without the lock: a full cache looks again whenever it has refused another eighth of its limit."""
        if not self._full or self._read_count()[0] + length <= self._limit:
            return True
        self._refused += length
        return self._refused >= self._limit // 8

    def make_room(self, *lengths: int) -> int | None:
        """Evict what no live process uses until ranges of these lengths fit; to be called under the lock.

        Returns:
            Bytes of disk space that are used now, None if there is no room.
        """
        used, current = self._read_count()
        if not current:
            used = self._recount()
        need = sum(map(self._blocks, lengths)) + 4 * self._block  # the last for the file system's own tree
        if not self._fits(used, need):
            used = self._evict(used, need)
        self._full, self._refused = not self._fits(used, need), 0
        return None if self._full else used

    @contextmanager
    def allocation(self, file: CacheFile, used: int) -> Iterator[None]:
        """Disk space may be allocated in this file; to be used under the lock.

        Args:
            file: one of the folder's.
            used: bytes of disk space that are used before, from `make_room`.
        """
        before = file.disk_space()
        self._write_count(used, current=False)
        try:
            yield
        finally:
            self._write_count(used + file.disk_space() - before)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the cache.

        Raises:
            TimeoutError: if another process does not give it back.
        """
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
    def errors_end_admission(self) -> Iterator[None]:
        """An error of the disk is logged once and ends admission, not the run."""
        try:
            yield
        except OSError as error:
            if self._admits:
                self._admits = False
                log.warning("%s: %s; this process keeps nothing more on this node's disk", self._folder, error.strerror or error)

    def _blocks(self, length: int) -> int:
        """Most disk space that a range of this length can touch."""
        return (length // self._block + 2) * self._block

    def _fits(self, used: int, need: int) -> bool:
        disk = os.statvfs(self._root)
        return used + need <= self._limit and disk.f_bavail * disk.f_frsize - need >= SPARE * disk.f_blocks * disk.f_frsize

    def _evict(self, used: int, need: int) -> int:
        """Delete what no live process uses until there is room, and some to spare: to look at all files takes long."""
        kept = {tar for tars in self._live().values() for tar in tars}
        with os.scandir(self._folder) as entries:
            dead = [(entry.stat().st_mtime_ns, entry.name) for entry in entries if TAR.fullmatch(entry.name) and entry.name not in kept]
        self._write_count(used, current=False)
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
            use = CacheFile(self._folder / "uses" / name, 0)
            try:
                use.lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                live[name] = (self._folder / "uses" / name).read_text().split()
            else:
                os.unlink(self._folder / "uses" / name)
        return live

    def _recount(self) -> int:
        """Add up the disk space of all files; the count stays marked as out of date until it is written."""
        self._write_count(0, current=False)  # the count, too, is a file with disk space
        folders = (self._folder, self._folder / "uses")
        return sum(entry.stat().st_blocks * 512 for folder in folders for entry in os.scandir(folder) if entry.is_file())

    def _read_count(self) -> tuple[int, bool]:
        data = self._count.read(0, COUNT.size)
        return COUNT.unpack(data) if len(data) == COUNT.size else (0, False)

    def _write_count(self, used: int, current: bool = True) -> None:
        self._count.write(0, COUNT.pack(used, current))
