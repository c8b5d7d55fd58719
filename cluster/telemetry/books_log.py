"""The books of a run's lives in its folder: `books/<life>.json`, written again every two seconds by the life's driver alone."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.storage import StorageError, Store
from cluster.telemetry.books import VERSION, Berth, Books
from cluster.telemetry.repeating import repeating

log = logging.getLogger(__name__)

EVERY = 2.0
"""Seconds between two writes: so much of a life whose driver is killed is not in its books."""

ENDED = "ended"
"""Key of what a record has once its life has ended: the status that it left."""

JOB = "job"
"""Key of the session of the cluster and the number of the job in it that a record's driver was; a trial of a sweep is no job."""

DRIVER = "driver"
"""Class of the fault that a driver was lost."""


def read_books(store: Store) -> list[dict[str, Any]]:
    """The records of all lives that have books, in order; one that cannot be read is left out, for a run goes on without it."""
    found = []
    for entry in store.list("books/"):
        try:
            record = json.loads(store.read(entry.key))
        except ValueError:
            record = {}
        if record.get("version") == VERSION:
            found.append(record)
        else:
            log.warning("%s/%s are no books of version %d: its life is not in the receipt", store.url, entry.key, VERSION)
    return found


@contextmanager
def keeping(store: Store, books: Books, facts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Keep the books of a life while the block runs, and as they are at its end.

    Args:
        store: the run's folder.
        books: of the life.
        facts: more to keep with them.
    """
    key = f"books/{books.life:06d}.json"

    def write() -> None:
        try:
            store.put(key, json.dumps(books.record(**facts())).encode())
        except StorageError as error:
            log.warning("the books are not kept for now: %s", error)

    write()
    try:
        with repeating(write, EVERY, "books"):
            yield
    finally:
        write()


def inherit(
    books: Books, earlier: Sequence[dict[str, Any]], ended: Callable[[str, str], int | None] = lambda session, job: None
) -> dict[str, str]:
    """Go on from the books of earlier lives; where the last one ended by a fault, it is why this one must start again.

    A driver that was lost could not write down its last seconds: what it held then, it held until its cluster learnt of it. Where nobody
    knows when that was, it is taken to have been `EVERY` seconds later.

    Args:
        books: of the life that begins.
        earlier: records of those before it, in order.
        ended: session and number of a job -> when the cluster learnt that it was gone, in milliseconds since 1970, if that is known.

    Returns:
        The stage that the fault hit -> its name; empty if there was none.
    """
    for record in earlier:
        for stage, progress in record["furthest"].items():
            books.furthest[stage] = max(books.furthest.get(stage, 0.0), progress)
    if not earlier:
        return {}
    last = earlier[-1]
    books.reached |= last.get("reached", {})
    books.owed |= {stage: [(upto, fault) for upto, fault in owed] for stage, owed in last.get("owed", {}).items()}
    if ENDED in last:
        return {fault["stage"]: fault["fault"] for fault in last["faults"] if fault["fault"] == last.get("fatal")}
    stage = last.get("stage", "")
    fault = books.fault(DRIVER, stage, f"the driver of life {last['life']} was lost", last["life"], restarts=True)
    if stage in books.reached:
        books.owe(stage, fault)
    known = ended(*last[JOB]) if JOB in last else None
    more = round(1000 * EVERY) if known is None else max(0, min(known, books.now()) - last["until"])
    for held_for, berth in last["held"]:
        if last["berths"][berth]["node"]:
            books.book(held_for, {"recovery": more}, books.now(), Berth(**last["berths"][berth]), fault)
    return {stage: fault}
