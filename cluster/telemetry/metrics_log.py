"""A run's metrics: rows keyed by (stage, progress), written as immutable segments of each life."""

import json
from collections.abc import Iterator
from typing import Any

from cluster.storage import Store


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
        """Keep a row until the next flush."""
        self._rows.append({"stage": self._stage, "progress": progress, "life": self._life, **values})

    def flush(self) -> None:
        """Write the rows since the last flush as one segment, never to be changed."""
        if self._rows:
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            self._store.create(f"{self._folder}/{self._stage}-{self._rows[0]['progress']:015d}.jsonl", text.encode())
            self._rows = []


def read_rows(store: Store, stage: str) -> list[dict[str, Any]]:
    """All rows of a stage in order of progress; where lives overlap, the newest one's."""
    found: dict[int, dict[str, Any]] = {}
    for row in _all(store, stage):
        if row["progress"] not in found or row["life"] >= found[row["progress"]]["life"]:
            found[row["progress"]] = row
    return [found[progress] for progress in sorted(found)]


def _all(store: Store, stage: str) -> Iterator[dict[str, Any]]:
    for entry in store.list("metrics/"):
        if entry.key.split("/")[-1].startswith(f"{stage}-"):
            for line in store.read(entry.key).decode().splitlines():
                yield json.loads(line)
