"""A folder as a store: temporary files, hard links and renames make every write atomic."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.storage.base import (
    PRIVATE,
    AlreadyExists,
    BeyondEnd,
    ByteCounter,
    Entry,
    NotFound,
    OnBytes,
    Permanent,
    Stale,
    StorageError,
    Store,
    checked_key,
    content_hash,
    ignore_bytes,
    remaining,
)

STAGED = f"{PRIVATE}staged-"
"""How the names of temporary files begin."""

ABANDONED = 3600.0
"""Seconds without a write after which a temporary file is taken for one that a killed writer left."""

IOV_MAX = 1024
"""Buffers that one system call fills, at most."""

_writing: set[str] = set()
"""Temporary files that this process writes just now."""

_last_cleanup: dict[Path, float] = {}
"""When this process last looked for those in each folder: to list a folder of many shards takes long."""


class FolderStore(Store):
    """Objects as files below a folder; the etag is a hash of the content."""

    node_local = True

    def __init__(self, root: Path, counter: ByteCounter | None = None):
        super().__init__(str(root), counter or ByteCounter())
        self._root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderStore, (self._root,)

    def at(self, prefix: str) -> "FolderStore":
        """The store of the objects below this prefix."""
        return FolderStore(self._root / checked_key(prefix), self._counter)

    def get(self, key: str) -> tuple[bytes, str]:
        """An object's content and its etag."""
        with self._errors(key):
            data = self._path(key).read_bytes()
        self._counter.add(len(data))
        return data, content_hash(data)

    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        """Fill writable buffers, one after the other, with an object's content from byte `start` on."""
        done, size = 0, sum(map(len, buffers))
        with self._errors(key), open(self._path(key), "rb", buffering=0) as file:
            while done < size and (count := os.preadv(file.fileno(), remaining(buffers, done)[:IOV_MAX], start + done)):
                done += count
        self._counter.add(done)
        if done < size:
            raise BeyondEnd(f"{self.url}/{key}: ends at byte {start + done}, but bytes {start} to {start + size} were asked for")
        for buffer in buffers:
            on_bytes(buffer)

    def size(self, key: str) -> int:
        """An object's size in bytes."""
        path = self._path(key)
        with self._errors(key):
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
            return path.stat().st_size

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, whatever was there before."""
        with self._errors(key, writing=True), self._temporary_file(key, data) as staged:
            os.replace(staged, self._path(key))

    def put_file(self, key: str, path: Path) -> None:
        """Write a large object from a local file, whatever was there before."""
        with self._errors(key, writing=True), self._temporary_file(key, path) as staged:
            os.replace(staged, self._path(key))

    def create(self, key: str, data: bytes) -> str:
        """Write an object that must not exist yet: a hard link to an existing name fails, for all racers but one."""
        with self._errors(key, writing=True), self._temporary_file(key, data) as staged:
            try:
                os.link(staged, self._path(key))
            except FileExistsError as error:
                raise AlreadyExists(f"{self.url}/{key}: exists already") from error
        return content_hash(data)

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Overwrite the content this etag stands for, under a lock that all replacers in the same folder take."""
        path = self._path(key)
        with self._errors(key, writing=True), self._temporary_file(key, data) as staged, open(path.parent / f"{PRIVATE}lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file() or content_hash(path.read_bytes()) != etag:
                raise Stale(f"{self.url}/{key}: is not the content of etag {etag} any more")
            os.replace(staged, path)
        return content_hash(data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key begins with this text, in the order of their keys' UTF-8 bytes."""
        checked_key(f"{prefix}x")
        folder = prefix.rpartition("/")[0]
        with self._errors(prefix):
            yield from _walk(self._root / folder, f"{folder}/" if folder else "", prefix)

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._errors(key), contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def delete_unfinished(self) -> None:
        """Remove the temporary files of all other processes that write or wrote below this folder."""
        with self._errors(""):
            for staged in self._root.rglob(f"{STAGED}*"):
                if str(staged) not in _writing:
                    staged.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    @contextlib.contextmanager
    def _temporary_file(self, key: str, source: bytes | memoryview | Path) -> Iterator[str]:
        """A temporary file beside the key, with the content synced to disk; it is removed at the end unless it was renamed."""
        folder = self._path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(prefix=STAGED, dir=folder)
        _writing.add(staged)
        try:
            with open(descriptor, "wb") as file:
                if (now := os.fstat(descriptor).st_mtime) - _last_cleanup.get(folder, 0.0) > ABANDONED:
                    _last_cleanup[folder] = now
                    _remove_orphans(folder, now)
                os.fchmod(descriptor, 0o644)
                if isinstance(source, Path):
                    with open(source, "rb") as original:
                        shutil.copyfileobj(original, file, 1 << 20)
                else:
                    file.write(source)
                file.flush()
                os.fsync(descriptor)
            yield staged
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            _writing.discard(staged)
        _sync(folder)

    @contextlib.contextmanager
    def _errors(self, key: str, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if writing:  # another process deleted the folder or the temporary file: to write it again may help
                raise StorageError(f"{self.url}/{key}: {error.strerror}") from error
            raise NotFound(f"{self.url}/{key}: there is no such object") from error
        except PermissionError as error:
            raise Permanent(f"{self.url}/{key}: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"{self.url}/{key}: {error.strerror or error}") from error


def _remove_orphans(folder: Path, now: float) -> None:
    """Remove temporary files that killed writers left in a folder; `now` is a time of the file system's clock."""
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # it was deleted meanwhile, or belongs to another user
            if entry.name.startswith(STAGED) and now - entry.stat().st_mtime > ABANDONED:
                os.unlink(entry)


def _sync(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path, key: str, prefix: str) -> Iterator[Entry]:
    """Files below a folder in key order: a folder sorts as its name with the '/' that follows."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    names = {f"{entry.name}/" if entry.is_dir() else entry.name: entry for entry in entries if not entry.name.startswith(PRIVATE)}
    for name in sorted(names, key=os.fsencode):
        path = f"{key}{name}"
        if name.endswith("/"):
            if path.startswith(prefix) or prefix.startswith(path):
                yield from _walk(folder / name, path, prefix)
        elif path.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                yield Entry(path, names[name].stat().st_size)
