"""Act as soon as a module is imported, in processes that others start: for a `sitecustomize` on their path."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _AfterImport(MetaPathFinder):
    """Finds the module as Python does, and acts after it was executed.

    Args:
        module: its full name.
        act: is given the module.
    """

    def __init__(self, module: str, act: Callable[[Any], None]):
        self._module, self._act = module, act

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_act(module: Any) -> None:
            execute(module)
            self._act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def after_import(module: str, act: Callable[[Any], None]) -> None:
    """Act when the module is imported, with the module."""
    sys.meta_path.insert(0, _AfterImport(module, act))
