"""Which checkpoints of a stage stay: those written last, one in every so many items for good, and those with the best scores."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.config.schema import Experiment
from cluster.runs.averages import marks
from cluster.runs.lineage import newest_first
from cluster.runs.state import Attempt
from cluster.storage import Store
from cluster.telemetry.metrics_log import read_rows, validation_name

METRIC = "FRCorr"
"""What is best: the higher, the better, on the clips of val that `evaluation.watch` asks for."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint as it lies in the store, whole or not.

    Attributes:
        key: of its manifest.
        progress: items that the optimiser had consumed.
        by: who wrote it.
        counts: whether it is of the run's lineage.
        parts: the keys of its parts; empty where the manifest cannot be read.
        bytes: of its parts, as the manifest has them.
        wrong: what is wrong with it, by names and sizes alone; empty if it is whole.
        readable: whether the manifest can be read.
        foreign: whether it cannot because another version of this program wrote it.
        score: METRIC; None if it was not scored.
    """

    key: str
    progress: int
    by: Attempt
    counts: bool = True
    parts: frozenset[str] = frozenset()
    bytes: int = 0
    wrong: str = ""
    readable: bool = True
    foreign: bool = False
    score: float | None = None


@dataclass(frozen=True)
class Retention:
    """Which whole checkpoints of a stage stay.

    The newest one after whole batches stays in any case: one after a last step that was smaller is of no use to a run that is made longer.

    Attributes:
        last: so many, those written last.
        every: items: the first one at or after each multiple of it stays for good; 0: none.
        best: so many of those that have a score; 0: none.
        averages: items: those at which a step of `batch` items reaches a multiple of it stay for good; 0: none.
        batch: items of a step.
    """

    last: int
    every: int = 0
    best: int = 0
    averages: int = 0
    batch: int = 1

    @classmethod
    def of(cls, experiment: Experiment, stage: str) -> "Retention":
        """What a run's configuration asks for."""
        run, batch = experiment.run, experiment.optim.batch[stage]
        return cls(run.keep, run.keep_every[stage], run.keep_best, experiment.ema_every(stage), batch)

    def kept(self, found: Iterable[StoredCheckpoint], committed: str = "") -> dict[str, str]:
        """Key -> why it stays, of each checkpoint that does.

        Those that do not count stay in no case, those of another version in any. One that is damaged stays until enough newer ones are
        whole: a copy may mend it. Where one progress was reached twice, only the later checkpoint is looked at for `every` and `best`.

        Args:
            found: all of a stage.
            committed: key of the one that was just committed, which stays.
        """
        why: dict[str, list[str]] = {}
        there = {one.key: one for one in found if one.counts or one.foreign}
        order = [there[key] for key in newest_first(there)]
        whole = 0
        for one in order:
            if one.foreign:
                why[one.key] = ["of another version"]
            elif one.key == committed or whole < self.last:
                why[one.key] = ["damaged, newer than the last" if one.wrong else "last"]
            whole += not one.wrong
        if longer := next((one for one in order if not one.wrong and one.progress % self.batch == 0), None):
            why.setdefault(longer.key, ["what a longer run goes on from"])
        at = {one.progress: one for one in reversed(order) if not one.wrong}
        scored = sorted(((one.score, one.progress) for one in at.values() if one.score is not None), reverse=True)
        firsts = {progress // self.every: at[progress] for progress in sorted(at, reverse=True)} if self.every else {}
        for mark, one in firsts.items():
            if mark:
                why.setdefault(one.key, []).append(f"every {self.every}")
        if self.averages:
            for progress in sorted(at.keys() & marks(self.averages, self.batch, max(at, default=0))):
                why.setdefault(at[progress].key, []).append("for averages")
        for _, progress in scored[: self.best]:
            why.setdefault(at[progress].key, []).append("best")
        return {key: ", ".join(reasons) for key, reasons in why.items()}


def checkpoint_scores(store: Store, stage: str) -> dict[int, float]:
    """Progress -> METRIC of the checkpoints of a stage that were scored while it was trained."""
    rows = read_rows(store, validation_name(stage))
    return {row["progress"]: row[METRIC] for row in rows if math.isfinite(row[METRIC])}
