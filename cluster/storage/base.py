"""What a store is: named byte objects with atomic writes, and the errors every kind of store raises."""

import hashlib
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PRIVATE = ".~"
"""A path segment that begins so belongs to the store itself: never a key, never listed."""

OnBytes = Callable[[memoryview], Any]
"""Called with each piece of a buffer once its bytes are there."""


def ignore_bytes(_: memoryview) -> None:
    """The default of `on_bytes`: does nothing."""


class StorageError(Exception):
    """A store could not do what was asked; the message names the URL and the cause, never a secret."""


class Permanent(StorageError):
    """The store answered, and it is no: no such object, access denied, or something that nobody can use. A retry does not help."""


class NotFound(Permanent):
    """There is no object of this key."""


class BeyondEnd(Permanent):
    """An object ends before the bytes that were asked for."""


class AlreadyExists(StorageError):
    """`create` found an object of this key: another writer was first."""


class Stale(StorageError):
    """`replace` found other content than the one its etag stands for: another writer was first."""


PROBES = "probes/"
"""Prefix of objects that are there for a moment."""

FORGOTTEN = 86_400
"""Seconds after which such an object is known to be of a process that was killed."""


class Entry(NamedTuple):
    """One listed object: its key and its size in bytes."""

    key: str
    size: int


class ByteCounter:
    """A count of bytes that many threads add to; shared by a store and its sub-stores."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count that many more bytes."""
        with self._lock:
            self.bytes += count


class Store(ABC):
    """Objects under one URL. Every write is whole or absent; keys are `/`-separated and relative to the URL.

    Attributes:
        url: where the objects lie; `open_store(url)` in any process opens the same store, and a store pickles as its URL.
        node_local: whether other machines may not see what is written here.
    """

    url: str
    node_local: bool

    def __init__(self, url: str, counter: ByteCounter):
        self.url, self._counter = url, counter

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url})"

    @property
    def bytes_read(self) -> int:
        """Bytes read so far through this store and all stores opened from it with `at`."""
        return self._counter.bytes

    @property
    def endpoint(self) -> str:
        """The server or folder that requests go to, for messages."""
        return self.url

    @abstractmethod
    def at(self, prefix: str) -> "Store":
        """The store of the objects below this prefix; it shares the connection and the byte count."""

    @abstractmethod
    def get(self, key: str) -> tuple[bytes, str]:
        """An object's content and its etag, which `replace` takes.

        Raises:
            NotFound: if there is none.
        """

    @abstractmethod
    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        """Fill writable buffers of bytes, one after the other, with an object's content from byte `start` on.

        Args:
            key: of the object.
            start: byte of it that comes first.
            buffers: to be filled.
            on_bytes: called with each piece of a buffer once its bytes are there, in their order, each byte once.

        Raises:
            NotFound: if there is no such object.
            BeyondEnd: if it ends before they are full.
        """

    @abstractmethod
    def size(self, key: str) -> int:
        """An object's size in bytes.

        Raises:
            NotFound: if there is none.
        """

    @abstractmethod
    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, whatever was there before."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Write a large object from a local file, whatever was there before."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> str:
        """Write an object that must not exist yet, and return its etag. Of all racers exactly one succeeds.

        Raises:
            AlreadyExists: if it does.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Overwrite the content this etag stands for, and return the new etag. Of all racers exactly one succeeds.

        Raises:
            Stale: if the object has other content by now, or is gone.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key begins with this text, in the order of their keys' UTF-8 bytes."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""

    @abstractmethod
    def delete_unfinished(self) -> None:
        """Remove what other processes, which were killed, left of objects that they did not finish; a write that goes on fails by it."""

    def read(self, key: str) -> bytes:
        """An object's whole content.

        Raises:
            NotFound: if there is none.
        """
        return self.get(key)[0]

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def assert_conditional_writes(self) -> None:
        """Try whether conditional writes work here: everything that must happen exactly once depends on them, and some servers ignore them.

        Raises:
            StorageError: if a second create or a stale replace succeeds.
        """
        key = probe_key(self)
        first = self.create(key, b"first")
        try:
            self._must_fail(AlreadyExists, "a second create of one key succeeded", lambda: self.create(key, b"second"))
            self.replace(key, b"third", first)
            self._must_fail(Stale, "a replace with a stale etag succeeded", lambda: self.replace(key, b"fourth", first))
        finally:
            self.delete(key)

    def _must_fail(self, expected: type[StorageError], what: str, write: Callable[[], str]) -> None:
        try:
            write()
        except expected:
            return
        raise Permanent(
            f"{self.url}: conditional puts are ignored by {self.endpoint} ({what}), so two runs could overwrite each other's state; "
            "use a store that honours If-None-Match and If-Match on PutObject (AWS S3 and SeaweedFS do)"
        )


def remaining(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left to be filled of these buffers when the first `done` bytes of them are."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest


def content_hash(data: bytes | memoryview) -> str:
    """32 hex digits (BLAKE2b, 128 bits) that stand for these bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def checked_key(key: str) -> str:
    """The key itself, if it is one.

    Raises:
        ValueError: for an absolute or empty key, `..`, or characters that not every store can hold.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") or part.startswith(PRIVATE) for part in parts) or "\\" in key or not key.isprintable():
        raise ValueError(
            f"{key!r} is no key of a store: use printable names joined by single '/', without a leading or trailing '/', "
            f"'.', '..', '\\' or a name that begins with {PRIVATE!r}"
        )
    return key


def probe_key(store: Store, clock: Callable[[], float] = time.time) -> str:
    """The key of an object that will be there for a moment; what killed processes left of theirs long ago is removed."""
    now = int(clock())
    for entry in store.list(PROBES):
        written = entry.key.removeprefix(PROBES).partition("-")[0]
        if written.isdecimal() and now - int(written) > FORGOTTEN:
            store.delete(entry.key)
    return f"{PROBES}{now}-{uuid.uuid4().hex}"
