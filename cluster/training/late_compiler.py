"""Training without torch's compiler, whose import takes a second of each start of a rank.

torch's optimizers and its shape functions load it unasked, to tell it that they are not to be compiled. Whatever else asks for it gets it.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"


class _NothingIsCompiled(ModuleType):
    """Stands for the compiler's module until something of it is needed but these two, which do nothing where nothing is compiled."""

    @staticmethod
    def disable(function: Callable[..., Any] | None = None, recursive: bool = True, **_: Any) -> Callable[..., Any]:
        """What is not compiled anyway."""
        return (lambda same: same) if function is None else function

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Here a graph of the compiler would end."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(DYNAMO) is self:
            del sys.modules[DYNAMO]
        return getattr(importlib.import_module(DYNAMO), name)


class _OnlyOnce(MetaPathFinder, Loader):
    """Finds the compiler's modules that are there.

    Who imports one of them first asks the stand-in for the package's path, which loads the package, the module often with it; Python
    would execute that a second time.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name.startswith(f"{DYNAMO}.") and name in sys.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It was executed before."""


def load_compiler_late() -> None:
    """Let torch's compiler be loaded by whoever compiles something, and not before. After `init_process_group`, which looks for it."""
    if DYNAMO not in sys.modules:
        sys.modules[DYNAMO] = _NothingIsCompiled(DYNAMO)
        sys.meta_path.insert(0, _OnlyOnce())
