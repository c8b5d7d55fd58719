"""Where this folder is on PYTHONPATH, a rank does what its machine has a file for in ASKED: faults for proofs that only a rank can make.

`nan_gradient`: its gradient is NaN. `out_of_memory`: it may have no more memory than it has, and needs more. A file of the same name in
HAPPENED says that it was done. Python imports a module of this name at its start. It wraps DeepSpeed's `backward` when that is imported,
and does nothing else.
"""

import importlib.util
import os
import resource
import sys
from typing import Any

ENGINE = "deepspeed.runtime.engine"
ASKED, HAPPENED = "/tmp/rank-faults", "/tmp/rank-faults-happened"

NEEDED = 1 << 28
"""Bytes that a rank needs and does not get: more than any allocator has in reserve."""


class _Wrapping:
    """Finds DeepSpeed's engine as Python does, and wraps it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        if (spec := importlib.util.find_spec(name)) is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _wrap(module.DeepSpeedEngine)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(engine: Any) -> None:
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


sys.meta_path.insert(0, _Wrapping())
