"""Something that is done again and again beside the work of a block."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

log = logging.getLogger(__name__)


@contextmanager
def repeating(act: Callable[[], None], every: float, name: str) -> Iterator[None]:
    """Act after each so many seconds, in a thread of that name; at the end of the block none is under way any more.

    What an act raises is logged, and the next one comes all the same.
    """
    done = Event()

    def repeat() -> None:
        while not done.wait(every):
            try:
                act()
            except Exception:
                log.exception("%s: tried again in %g s", name, every)

    thread = Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
