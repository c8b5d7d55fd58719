"""Scores that a comparison keeps, by run, row and clip: small enough for a repository, so that nobody need train for them again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.identity import digest, ends, name_fields
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.evaluation.plan import VERSION, revised
from cluster.evaluation.rows import rows_of
from reactdiff.metrics.intervals import percentiles, resampled_means
from reactdiff.metrics.partial import PER_CLIP, PartialScores, means_to_metrics

DIGITS = 4
"""Digits that are kept of a metric's values, counted from the first one of the largest."""

ABOUT = ("name", "parameters", "gflop", "tflop")
"""What is kept of a run beside its scores."""


@dataclass(frozen=True)
class ClipScores:
    """What a row scored on each clip: all metrics that are means over clips, or ratios of such.

    Attributes:
        values: (clips, len(PER_CLIP)) float64, of so many digits as are kept.
        predictions: reactions to each clip.
    """

    values: np.ndarray
    predictions: int

    @classmethod
    def of(cls, part: PartialScores) -> "ClipScores":
        """What is kept of an evaluation's row."""
        return cls(np.stack([np.round(column, _decimals(column)) for column in part.values.T], axis=1), len(part.mean))

    def metrics(self) -> dict[str, float]:
        """Metric -> value."""
        return {name: float(value) for name, value in means_to_metrics(self.values.mean(axis=0), self.predictions).items()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Metric -> 95 % bootstrap interval over the clips."""
        means = resampled_means(self.values, seed=0, resamples=1000)
        return {name: percentiles(values, 0.95) for name, values in means_to_metrics(means, self.predictions).items()}

    def columns(self, *names: str) -> np.ndarray:
        """Some metrics of each clip, (clips, names)."""
        return self.values[:, [PER_CLIP.index(name) for name in names]]


@dataclass(frozen=True)
class RunScores:
    """What is kept of a run.

    Attributes:
        name: for people, of its row and seed.
        parameters: of all its stages.
        gflop: of training on one item of the last stage.
        tflop: of the training of all its stages.
        rows: of its evaluation, by name.
    """

    name: str
    parameters: int
    gflop: float
    tflop: float
    rows: Mapping[str, ClipScores]


def scores_key(experiment: Experiment, manifest: Manifest) -> str:
    """Stands for all that a run's scores depend on, and for the rows that they are of.

    Args:
        experiment: of the run.
        manifest: state of the dataset that it is pinned to.
    """
    asked = experiment.evaluation.model_dump(mode="json", include={"split", "predictions", "clips"})
    rows = [revised(row) for row in rows_of(experiment, manifest.provenance)]
    return digest([VERSION, PER_CLIP, rows, name_fields(experiment), ends(experiment), asked, _data(manifest)])


def _data(manifest: Manifest) -> Any:
    """Stands for a dataset. Simulated clips are a function of their settings, but for rounding: their bytes depend on CPU and NumPy."""
    if "simulator" not in manifest.provenance:
        return manifest.hash
    clips = {split: int(manifest.counts(split).sum()) for split in manifest.splits}
    return [manifest.provenance, manifest.frames, [stream.model_dump() for stream in manifest.streams], clips]


def read_scores(file: Path) -> dict[str, RunScores]:
    """Key -> scores of each run in a file; none if there is no such file.

    Raises:
        ValueError: if it is damaged.
    """
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        columns = {name: np.array(whole, dtype=np.float64) / 10**places for name, (places, whole) in kept["columns"].items()}
        return {
            key: RunScores(
                **{about: one[about] for about in ABOUT},
                rows={
                    row: ClipScores(np.stack([columns[name] for name in names.split()], axis=1), one["predictions"])
                    for row, names in one["rows"].items()
                },
            )
            for key, one in kept["runs"].items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no scores ({error!r}): restore it, or delete it and train its runs again") from None


def read_all_scores(folder: Path) -> dict[str, RunScores]:
    """Key -> scores of each run in all files of a folder: what a run scored does not depend on what it is compared with.

    Raises:
        ValueError: as `read_scores`.
    """
    return {key: scores for file in sorted(folder.glob("*.json")) for key, scores in read_scores(file).items()}


def write_scores(file: Path, runs: Mapping[str, RunScores]) -> None:
    """Write a file of runs by key. A metric's values are whole numbers and how many decimals they have; equal ones are kept once."""
    columns: dict[str, tuple[int, list[int | None]]] = {}
    entries = {}
    for key, run in runs.items():
        rows = {}
        for row, scores in run.rows.items():
            kept = [_whole(column) for column in scores.values.T]
            names = [digest(column)[:12] for column in kept]
            columns |= zip(names, kept, strict=True)
            rows[row] = " ".join(names)
        (predictions,) = {scores.predictions for scores in run.rows.values()}
        entries[key] = {**{about: getattr(run, about) for about in ABOUT}, "predictions": predictions, "rows": rows}
    lines = ",\n".join(f'"{name}": {json.dumps(column, separators=(",", ":"))}' for name, column in columns.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(f'{{"metrics": {json.dumps(PER_CLIP)},\n"runs": {json.dumps(entries, indent=1)},\n"columns": {{\n{lines}\n}}}}\n')
    part.replace(file)


def _decimals(column: np.ndarray) -> int:
    """How many are kept of a metric's values: the same of these as of those that are already rounded."""
    largest = np.abs(column[~np.isnan(column)]).max(initial=0.0)
    return max(0, DIGITS - 1 - int(f"{largest:.{DIGITS - 1}e}".partition("e")[2]))


def _whole(column: np.ndarray) -> tuple[int, list[int | None]]:
    places = _decimals(column)
    return places, [None if np.isnan(value) else round(value * 10**places) for value in column.tolist()]
