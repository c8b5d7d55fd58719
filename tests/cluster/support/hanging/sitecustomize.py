"""On the PYTHONPATH of a run, makes a rank hang where a test asks for it: HANGING is a folder, and a file in it such as `lock-1` the order.

`lock`: the rank waits for a lock that nobody gives back, in its backward pass. `skip`: it leaves out the small all-reduce of a step, so its
peers wait for it there. The file is renamed to `lock-1.happened` when it has happened, once.
"""

import os
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

LAST = "cluster.training.engine"


class AfterImport(MetaPathFinder):
    """Wraps what hangs as soon as there is an engine."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != LAST:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            wrap(module.Engine)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def wrap(engine: Any) -> None:
    """Look for an order at each backward pass and each small all-reduce."""
    import torch
    import torch.distributed as dist

    backward, all_reduce = engine.backward, dist.all_reduce

    def backward_or_hang(self: Any, loss: Any) -> Any:
        if ordered("lock", dist.get_rank()):
            lock = threading.Lock()
            with lock:
                lock.acquire()
        return backward(self, loss)

    def all_reduce_or_skip(tensor: Any, *arguments: Any, **options: Any) -> Any:
        if tensor.dtype == torch.float64 and ordered("skip", dist.get_rank()):
            return None
        return all_reduce(tensor, *arguments, **options)

    engine.backward, dist.all_reduce = backward_or_hang, all_reduce_or_skip


def ordered(what: str, rank: int) -> bool:
    """Whether a test asks this rank to hang here, now; it is told that it does."""
    order = os.path.join(os.environ["HANGING"], f"{what}-{rank}")
    try:
        os.rename(order, f"{order}.happened")
    except FileNotFoundError:
        return False
    return True


if "HANGING" in os.environ:
    sys.meta_path.insert(0, AfterImport())
