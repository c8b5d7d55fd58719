"""Many small requests to a store, several at the same time: each waits for the network, not for this machine."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

PARALLEL_REQUESTS = 16
AHEAD = 256


def parallel_map(function: Callable[[A], B], items: Sequence[A], ahead: int = AHEAD) -> Iterator[B]:
    """Like `map`, in the same order; at most `ahead` results are held, and whoever stops listening waits for those that were begun."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="overlap") as pool:
        for first in range(0, len(items), ahead):
            yield from pool.map(function, items[first : first + ahead])
