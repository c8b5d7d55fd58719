"""A tar in a store, read once from beginning to end, a few megabytes at a time, with the hash of all its bytes."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

from cluster.runtime.stuck import alive
from cluster.storage import Store

CHUNK = 8 << 20
"""Bytes read at once and held: what reading a shard costs in memory, whatever its size. A multiple of a tar's blocks of 512 bytes."""


class SequentialReader(io.RawIOBase):
    """A file that is read forwards only; `tarfile` reads from it, too.

    Args:
        store: where it is.
        key: of the tar.
        size: its bytes.
    """

    def __init__(self, store: Store, key: str, size: int):
        self.key, self.size = key, size
        self._store, self._at, self._start = store, 0, 0
        self._buffer, self._chunk = bytearray(min(CHUNK, size)), memoryview(b"")
        self._hash = hashlib.blake2b(digest_size=16)

    def chunks(self, length: int) -> Iterator[memoryview]:
        """The next `length` bytes, fewer where the file ends, in pieces; each piece is valid until the next one is asked for.

        Raises:
            StorageError: if they cannot be read.
        """
        end = min(self._at + length, self.size)
        while self._at < end:
            while self._at >= self._start + len(self._chunk):
                self._load()
            first = self._at - self._start
            piece = self._chunk[first : first + end - self._at]
            self._at += len(piece)
            yield piece

    def digest(self) -> str:
        """The hash of the whole file; what has not been read yet is read now."""
        while self._start + len(self._chunk) < self.size:
            self._load()
        return self._hash.hexdigest()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes, less only at the end."""
        done = 0
        for piece in self.chunks(len(buffer)):
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Continue at another byte, not before the first one of the chunk that is held now."""
        assert whence == io.SEEK_SET and position >= self._start, f"{self.key} is read forwards"
        self._at = position
        return position

    def tell(self) -> int:
        """Where the next byte is."""
        return self._at

    def readable(self) -> bool:
        """Always true."""
        return True

    def _load(self) -> None:
        alive()
        self._start += len(self._chunk)
        self._chunk = memoryview(self._buffer)[: min(len(self._buffer), self.size - self._start)]
        self._store.read_into(self.key, self._start, self._chunk)
        self._hash.update(self._chunk)
