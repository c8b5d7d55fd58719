"""Objects that are compared with the hash of their content when they are read."""

import hashlib
import logging
from collections.abc import Callable

from cluster.storage.base import StorageError, Store, content_hash

log = logging.getLogger(__name__)

PIECE = 16 << 20
"""Bytes that are read at once of an object that comes in pieces."""


class HashMismatch(StorageError):
    """The hash of an object is not the one that it was written with.

    Attributes:
        actual: the hash of what was read.
    """

    def __init__(self, where: str, expected: str, actual: str):
        super().__init__(where, expected, actual)
        self.where, self.expected, self.actual = where, expected, actual

    def __str__(self) -> str:
        return f"{self.where} has hash {self.actual}, but was written with {self.expected}"


def read_verified(store: Store, key: str, digest: str) -> bytes:
    """An object's whole content, compared with its hash; if that differs, it is read once more: bytes can be damaged on their way.

    Raises:
        NotFound: if there is none.
        HashMismatch: if it differs both times.
    """
    actual = ""
    for _ in range(2):
        if actual:
            log.warning("%s/%s came with hash %s, but was written with %s; reading it once more", store.url, key, actual, digest)
        data = store.read(key)
        if (actual := content_hash(data)) == digest:
            return data
        del data  # so that a part of a checkpoint is not in memory twice
    raise HashMismatch(f"{store.url}/{key}", digest, actual)


def stream_verified(store: Store, key: str, digest: str, take: Callable[[int, memoryview], None]) -> None:
    """Read an object a piece at a time and compare it with its hash; if that differs, read it once more, as `read_verified`.

    Args:
        store: that has it.
        key: of the object.
        digest: its hash.
        take: given each piece and the byte where it begins, in order; the memory is used again. What it was given counts only once this
            has returned, and it is given all of it again where the hash differed.

    Raises:
        NotFound: if there is none.
        HashMismatch: if it differs both times.
    """
    size, actual = store.size(key), ""
    memory = memoryview(bytearray(min(PIECE, size)))
    for _ in range(2):
        if actual:
            log.warning("%s/%s came with hash %s, but was written with %s; reading it once more", store.url, key, actual, digest)
        found = hashlib.blake2b(digest_size=16)
        for start in range(0, size, PIECE):
            piece = memory[: min(PIECE, size - start)]
            store.read_into(key, start, piece)
            found.update(piece)
            take(start, piece)
        if (actual := found.hexdigest()) == digest:
            return
    raise HashMismatch(f"{store.url}/{key}", digest, actual)


def assert_content(store: Store, key: str, digest: str) -> None:
    """Compare an object with its hash, with little memory, so that many large ones can be at once.

    Raises:
        NotFound, HashMismatch: as `stream_verified`.
    """
    stream_verified(store, key, digest, lambda *_: None)
