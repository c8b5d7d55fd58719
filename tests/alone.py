"""Tests that need the machine to themselves (mark `alone`): they load it on purpose, or measure what others would disturb.

Of the processes that share a run of the tests, one runs such a test while the others wait between theirs.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside_others(folder: Path, alone: bool) -> Iterator[None]:
    """Run a test beside those of the other processes, or wait until these stand still and keep them there.

    Args:
        folder: that the processes share, for two locks.
        alone: whether the test needs the machine to itself.
    """
    with (folder / "turn").open("w") as turn, (folder / "machine").open("w") as machine:
        fcntl.flock(turn, fcntl.LOCK_EX)  # who waits to be alone is overtaken by nobody
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
