"""On the PYTHONPATH of a run, makes a rank hang where a test asks for it: HANGING is a folder, and a file in it such as `lock-1` the order.

`lock`: the rank waits for a lock that nobody gives back, in its backward pass. `skip`: it leaves out the small all-reduce of a step, so its
peers wait for it there. The file is renamed to `lock-1.happened` when it has happened, once.
"""

import os
import threading
from typing import Any

from cluster.runtime.after_import import after_import


def wrap(module: Any) -> None:
    """Look for an order at each backward pass and each small all-reduce."""
    import torch
    import torch.distributed as dist

    engine = module.Engine
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
    after_import("cluster.training.engine", wrap)
