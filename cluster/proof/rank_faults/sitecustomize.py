"""Where this folder is on PYTHONPATH, a rank does what its machine has a file for in ASKED: faults for proofs that only a rank can make.

`nan_gradient`: its gradient is NaN. `out_of_memory`: it may have no more memory than it has, and needs more. A file of the same name in
HAPPENED says that it was done. Python imports a module of this name at its start. It wraps DeepSpeed's `backward` when that is imported,
and does nothing else.
"""

import os
import resource
import sys
from typing import Any

from cluster.runtime.after_import import after_import

ASKED, HAPPENED = "/tmp/rank-faults", "/tmp/rank-faults-happened"

NEEDED = 1 << 28
"""Bytes that a rank needs and does not get: more than any allocator has in reserve."""


def _wrap(module: Any) -> None:
    engine = module.DeepSpeedEngine
    backward = engine.backward

    def faulty(self: Any, loss: Any, *arguments: Any, **options: Any) -> Any:
        if _asked("nan_gradient"):
            loss = loss * float("nan")
        if _asked("out_of_memory"):
            with open("/proc/self/statm") as sizes:
                held = int(sizes.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held, resource.getrlimit(resource.RLIMIT_AS)[1]))
            sys.modules["torch"].empty(NEEDED, dtype=sys.modules["torch"].uint8)
        return backward(self, loss, *arguments, **options)

    engine.backward = faulty


def _asked(name: str) -> bool:
    if not os.path.exists(os.path.join(ASKED, name)):
        return False
    os.makedirs(HAPPENED, exist_ok=True)
    open(os.path.join(HAPPENED, name), "w").close()
    return True


after_import("deepspeed.runtime.engine", _wrap)
