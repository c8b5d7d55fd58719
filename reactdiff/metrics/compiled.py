"""Kernels that are compiled once on a machine: the first process that needs them does it, all others load what it made.

numba keeps code in files, and would do alone if processes came one after the other and ended in peace. They come all at once and are
killed at any moment, so two things are added. Files are named by the source and the processor they are for: numba writes an index
before the code it names, and a new source's index that names an old source's code would compute something else in silence. And who
compiles holds a lock, so that others wait and load, and no two write one index.
"""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding
from numba.core.caching import UserWideCacheLocator

LOCATOR = f"{__name__}.SourceLocator"


class SourceLocator(UserWideCacheLocator):
    """Files in numba's folder of the user (`~/.cache/numba`), by the content of the source and the processor."""

    def get_disambiguator(self) -> str:
        """What numba adds to the name of a function: its line, and a hash."""
        processor = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
        digest = hashlib.sha256(self.get_source_stamp() + processor.encode()).hexdigest()
        return f"{super().get_disambiguator()}-{digest[:16]}"


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock, whose code is kept where a folder for it can be written.

    What it calls must be of the same file: of others no change would be noticed.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        settings: Any = numba.config
        before, settings.CACHE_LOCATOR_CLASSES = settings.CACHE_LOCATOR_CLASSES, LOCATOR
        try:
            compiled = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder: each process compiles for itself
            return numba.njit(nogil=True, **options)(function)
        else:
            compiled._cache.save_overload = _if_there_is_room(compiled._cache.save_overload)
            return compiled
        finally:
            settings.CACHE_LOCATOR_CLASSES = before

    return decorate


def _if_there_is_room(save: Callable[..., None]) -> Callable[..., None]:
    """What was compiled is of use, too, where the disk is full."""

    def saved(*given: Any) -> None:
        with suppress(OSError):
            save(*given)

    return saved


@contextmanager
def compiling() -> Iterator[None]:
    """One process of the machine, or of all that share the folder, is in here."""
    locator = SourceLocator.from_function(kernel, __file__)
    with ExitStack() as held:
        if locator is not None:
            with suppress(OSError):  # of a full disk
                lock = held.enter_context(open(Path(locator.get_cache_path()) / "reactdiff.lock", "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
