"""A run's metrics: rows keyed by (stage, progress), written as immutable segments of each life."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cluster.storage import AlreadyExists, Store


def validation_name(stage: str) -> str:
    """What the scores of a stage's checkpoints are kept under, as if they were a stage's rows."""
    return f"val-{stage}"


class MetricsLog:
    """Collects rows of one stage in one attempt of one life and writes them as segments."""

    def __init__(self, store: Store, life: int, attempt: int, stage: str):
        self._store, self._life, self._stage = store, life, stage
        self._folder = f"metrics/{life:06d}.{attempt}"
        self._rows: list[dict[str, Any]] = []

    def add(self, *, progress: int, **values: float) -> None:
        """Keep a row until the next flush, with the time of now in seconds of Unix time."""
        self._rows.append({"stage": self._stage, "progress": progress, "life": self._life, "time": round(time.time(), 3), **values})

    def flush(self) -> None:
        """Write the rows since the last flush as one segment, never to be changed."""
        self.take()()

    def take(self) -> Callable[[], None]:
        """What writes the rows of now, in any thread; they are no rows of the next segment any more."""
        rows, self._rows = self._rows, []
        return partial(self._write, rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Where there is a segment of its name, another group of ranks had the same numbers and was given up; both stay."""
        if not rows:
            return
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        name = f"{self._folder}/{self._stage}-{rows[0]['progress']:015d}"
        for twin in itertools.count():
            try:
                self._store.create(f"{name}.{twin}.jsonl" if twin else f"{name}.jsonl", text)
                break
            except AlreadyExists:
                continue


def read_rows(store: Store, stage: str) -> list[dict[str, Any]]:
    """All rows of a stage in order of progress; where lives or their attempts overlap, the newest one's.

    They are without their times, so equal runs have equal rows.
    """
    found: dict[int, tuple[tuple[int, int], dict[str, Any]]] = {}
    for attempt, row in every_row(store, stage):
        row.pop("time", None)
        if row["progress"] not in found or attempt >= found[row["progress"]][0]:
            found[row["progress"]] = attempt, row
    return [found[progress][1] for progress in sorted(found)]


def every_row(store: Store, stage: str) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Every row of a stage, also of what was done again, and the numbers of the life and the attempt that wrote it."""
    for entry in store.list("metrics/"):
        _, folder, name = entry.key.split("/")
        if name.startswith(f"{stage}-"):
            life, _, attempt = folder.partition(".")
            for line in store.read(entry.key).decode().splitlines():
                yield (int(life), int(attempt)), json.loads(line)
