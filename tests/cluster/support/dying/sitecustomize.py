"""On the PYTHONPATH of a command, numbers the writes of all its processes, and ends the one that is about to do the one asked for.

DYING_WRITES is a file that gets a line for each, DYING_AT the number of the one, from 0; it ends with 137 then, as a SIGKILL would have it.
What is written again every few seconds, heartbeats of leases and books, is left out: how often says only how long it took.
"""

import fcntl
import os
import re
from typing import Any

from cluster.runtime.after_import import after_import

PERIODIC = re.compile(r"replace \S+/lease\.json|put \S+/books/\d+\.json")


def watch(module: Any) -> None:
    """The folder's module is the last of the store's whose writes are watched."""
    from tests.cluster.support.writes import watch_writes

    watch_writes(count)


def count(what: str) -> None:
    """Write the line; die if it is the one."""
    if PERIODIC.fullmatch(what):
        return
    with open(os.environ["DYING_WRITES"], "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = sum(1 for _ in file)
        file.write(f"{what} {os.getpid()}\n")
        file.flush()
        if number == int(os.environ["DYING_AT"]):
            os._exit(137)


if "DYING_WRITES" in os.environ:
    after_import("cluster.storage.folder", watch)
