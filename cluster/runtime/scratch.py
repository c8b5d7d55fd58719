"""Temporary folders of this node: for shards on their way to a store, and for what Ray Train writes and nobody reads.

A task that is killed cannot remove its own, which may hold gigabytes: the next one on its node does. A folder is locked while its
process lives; the lock is a flock, which the kernel releases however the process ends.
"""

import fcntl
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = f"reactdiff-scratch-{platform.node()}-"
"""What their names begin with: of this node, for not every file system that nodes share knows other nodes' locks."""

OURS = re.compile(re.escape(PREFIX) + r"[a-z0-9_]{8}")
"""Their whole names, by which node a is told from node a-2."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below TMPDIR (/tmp) that is gone afterwards; before, what dead processes left there is removed.

    Raises:
        OSError: if it cannot be created, for example because the disk is full.
    """
    remove_abandoned(Path(tempfile.gettempdir()))
    folder, lock = _locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(root: Path) -> None:
    """Remove all such folders here that no living process has locked."""
    for folder in root.iterdir():
        if not OURS.fullmatch(folder.name):
            continue
        with suppress(OSError):  # another user's; gone since; locked (BlockingIOError); of a file system without locks
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked() -> tuple[Path, int]:
    """A new folder and its lock, which is held until it is closed."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # swept before it was opened
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # nothing is swept where nothing can be locked
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)
