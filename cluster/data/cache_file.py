"""One open file of the cache, shared by the threads of a process: whole reads and writes, disk space, a lock."""

import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class CacheFile:
    """An open file, closed when the last thread that uses it lets go of this object; the descriptor never leaves it.

    Args:
        path: of the file.
        flags: of `os.open`, beside reading and writing.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: str | Path, flags: int):
        self._descriptor = os.open(path, os.O_RDWR | flags, 0o600)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from an offset on; fewer where the file ends."""
        return os.pread(self._descriptor, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at an offset."""
        os.pwrite(self._descriptor, data, offset)

    def transfer(self, call: Callable[[int, Sequence[memoryview], int], int], offset: int, buffers: Iterable[memoryview]) -> bool:
        """Call `os.preadv` or `os.pwritev` until all buffers are read or written; returns whether they are."""
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
        """Get disk space for a range; what is in it stays."""
        os.posix_fallocate(self._descriptor, offset, length)

    def disk_space(self) -> int:
        """Bytes of disk space that the file has."""
        return os.fstat(self._descriptor).st_blocks * 512

    def deleted(self) -> bool:
        """Whether the file was deleted since it was opened."""
        return not os.fstat(self._descriptor).st_nlink

    def lock(self, operation: int) -> None:
        """Lock or unlock the file with this operation of `flock`."""
        fcntl.flock(self._descriptor, operation)

    def touch(self) -> None:
        """Set its times to now."""
        os.utime(self._descriptor)
