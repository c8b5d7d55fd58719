"""A look at a process of ours from outside, on its own machine: why it does not answer, and its end."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from cluster.storage import StorageError, Store


@ray.remote
def postmortem(store: Store, key: str, pid: int, kill: bool) -> None:
    """Keep what can be seen of a Ray worker process, unless it has said so itself, and kill it if that is asked for.

    Args:
        store: where it is kept.
        key: of the object that is kept; if it is there, the process wrote it.
        pid: of the process, on this machine.
        kill: whether to end it, which also ends one that is stopped.
    """
    try:
        process = psutil.Process(pid)
        if not process.name().startswith("ray::"):
            return  # it is gone, and another process has its number
        with suppress(StorageError):
            if not store.exists(key):
                store.put(key, f"{process.name()}, pid {pid}, is {process.status()}\n{_stacks(pid)}".encode())
    except psutil.NoSuchProcess:
        return
    if kill:
        kill_worker(pid)


def kill_worker(pid: int) -> None:
    """Kill a process of this machine, unless it is gone and another one, which is no Ray worker, has its number."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(pid).name().startswith("ray::"):
            os.kill(pid, signal.SIGKILL)


def _stacks(pid: int) -> str:
    """What py-spy reads in the process's memory; it does not stop it."""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}"
    return done.stdout or f"no stacks: {done.stderr}"
