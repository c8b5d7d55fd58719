"""On the PYTHONPATH of a command, numbers the writes of all its processes, and ends the one that is about to do the one asked for.

DYING_WRITES is a file that gets a line for each, DYING_AT the number of the one, from 0; it ends with 137 then, as a SIGKILL would have it.
Heartbeats of leases are left out: how many there are says only how long it took.
"""

import fcntl
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

LAST = "cluster.storage.folder"
"""The module after whose import all of the store that is used can be watched."""


class AfterImport(MetaPathFinder):
    """Watches the writes as soon as there is a store."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != LAST:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_watch(module: Any) -> None:
            execute(module)
            from tests.cluster.support.writes import watch_writes

            watch_writes(count)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


def count(what: str) -> None:
    """Write the line; die if it is the one."""
    if what.endswith("/lease.json") and what.startswith("replace"):
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
    sys.meta_path.insert(0, AfterImport())
