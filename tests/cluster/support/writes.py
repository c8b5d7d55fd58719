"""A look before every operation that writes to a store, of whatever kind and by whatever thread of this process."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from cluster.storage.base import Store

READS = {"at", "get", "read_into", "size", "list"}

WRITES = frozenset(Store.__abstractmethods__) - READS
"""The operations that every kind of store must have and that change something: what a new one does not say to be a read is one."""


def watch_writes(look: Callable[[str], None], patch: Callable[[type, str, Any], None] = setattr) -> None:
    """From now on call `look("<operation> <URL>")` before each of them; `patch` sets the attributes."""
    for kind in _kinds(Store):
        for name in WRITES & vars(kind).keys():
            patch(kind, name, _watched(vars(kind)[name], look))


def _watched(write: Callable[..., Any], look: Callable[[str], None]) -> Callable[..., Any]:
    @functools.wraps(write)
    def watched(store: Store, *given: Any) -> Any:
        look(f"{write.__name__} {store.url}/{given[0] if given else ''}")
        return write(store, *given)

    return watched


def _kinds(of: type) -> Iterator[type]:
    for kind in of.__subclasses__():
        yield kind
        yield from _kinds(kind)
