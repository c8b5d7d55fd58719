"""Training without torch's compiler, whose import takes a second of each start of a rank.

torch's optimizers and its shape functions load it unasked, to tell it that they are not to be compiled. Whatever else asks for it gets it.
"""

import importlib
import sys
from collections.abc import Callable
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


def load_compiler_late() -> None:
    """Let torch's compiler be loaded by whoever compiles something, and not before. After `init_process_group`, which looks for it."""
    sys.modules.setdefault(DYNAMO, _NothingIsCompiled(DYNAMO))
