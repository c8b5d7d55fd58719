"""Many small requests to a store in parallel: each waits for the network, not for a processor."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

PARALLEL_REQUESTS = 16
"""Requests at the same time."""

AHEAD = 256
"""Results that are held beside the one that is used, at most."""


def parallel_map(function: Callable[[A], B], items: Iterable[A], ahead: int = AHEAD) -> Iterator[B]:
    """Like `map` in threads, with the results in the order of the items; while one is used, the next ones are on their way.

    Closing the iterator early, or an error, waits for the calls that have begun, and makes no others.

    Args:
        function: called in several threads.
        items: its arguments.
        ahead: results that are held beside the one that is used, at most.
    """
    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="parallel") as pool:
        coming: deque[Future[B]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(function, item))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for one in coming:
                one.cancel()
