"""Many small requests to a store in parallel: each waits for the network, not for a processor."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

PARALLEL_REQUESTS = 16
"""Requests at the same time."""

AHEAD = 256
"""Results that are held, at most."""


def parallel_map(function: Callable[[A], B], items: Sequence[A], ahead: int = AHEAD) -> Iterator[B]:
    """Like `map` in threads, with the results in the order of the items.

    Calls are made in groups of `ahead`; closing the iterator early waits for the calls of its group that have begun.

    Args:
        function: called in several threads.
        items: its arguments.
        ahead: results that are held, at most.
    """
    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="parallel") as pool:
        for first in range(0, len(items), ahead):
            yield from pool.map(function, items[first : first + ahead])
