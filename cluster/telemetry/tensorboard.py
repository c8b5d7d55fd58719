"""A run's rows of metrics as curves for TensorBoard."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.storage import Store
from cluster.telemetry.metrics_log import read_rows

SHOWN = ("loss", "gradient_norm", "learning_rate", "FRCorr", "FRDist")
"""Columns that become TensorBoard curves."""


def write_tensorboard(store: Store, stage: str) -> None:
    """A stage's rows as TensorBoard events below `tensorboard/<stage>/`, over progress in items; earlier events are replaced."""
    with tempfile.TemporaryDirectory() as folder:
        with EventWriter(folder) as events:
            for row in read_rows(store, stage):
                events.row(stage, row["progress"], {name: row[name] for name in SHOWN if name in row})
        for entry in list(store.list(f"tensorboard/{stage}/")):
            store.delete(entry.key)
        for path in Path(folder).rglob("events*"):
            store.put(f"tensorboard/{stage}/{path.name}", path.read_bytes())


class EventWriter:
    """The run's curves as TensorBoard events, one TensorBoard run per stage below the folder; a context manager.

    The global step is the progress in items. A life that resumes at an earlier progress supersedes the rows that the one
    before wrote after it, as TensorBoard does with what comes after a `purge_step`.
    """

    def __init__(self, folder: str | Path):
        # Imported here: it takes more than a second, and only drivers write events.
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = Path(folder)
        self._writers: dict[str, SummaryWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def row(self, stage: str, progress: int, values: Mapping[str, float]) -> None:
        """Add a point to each of the stage's curves."""
        if stage not in self._writers:
            self._writers[stage] = self._open(str(self._folder / stage), purge_step=progress)
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, global_step=progress)

    def close(self) -> None:
        """Write out what is left."""
        for writer in self._writers.values():
            writer.close()
