"""Where this folder is on PYTHONPATH, a rank's gradient is NaN as long as its machine has the file `ASKED`: a fault for proofs.

Python imports a module of this name at its start. It wraps DeepSpeed's `backward` when that is imported, and does nothing else.
"""

import importlib.util
import os
import sys
from typing import Any

ENGINE = "deepspeed.runtime.engine"
ASKED, HAPPENED = "/tmp/nan-gradient", "/tmp/nan-gradient-happened"


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

    def poisoned(self: Any, loss: Any, *arguments: Any, **options: Any) -> Any:
        if os.path.exists(ASKED):
            loss = loss * float("nan")
            open(HAPPENED, "w").close()
        return backward(self, loss, *arguments, **options)

    engine.backward = poisoned


sys.meta_path.insert(0, _Wrapping())
