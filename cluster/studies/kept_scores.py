"""Scores that a comparison keeps, by run, row and clip: small enough for a repository, so that nobody need train for them again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.config.identity import digest, ends, name_fields
from cluster.config.schema import Experiment
from cluster.evaluation.plan import VERSION
from reactdiff.metrics.intervals import percentiles, resampled_means
from reactdiff.metrics.partial import PER_CLIP, PartialScores, means_to_metrics

DIGITS = 4
"""Significant digits that are kept of a clip's value."""


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
        return cls(np.array([[float(f"{value:.{DIGITS}g}") for value in row] for row in part.values.tolist()]), len(part.mean))

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


def scores_key(experiment: Experiment, manifest: str) -> str:
    """Stands for all that a run's scores depend on.

    Args:
        experiment: of the run.
        manifest: hash of the state of the dataset that it is pinned to.
    """
    asked = experiment.evaluation.model_dump(mode="json", include={"split", "predictions", "clips", "baselines"})
    return digest([VERSION, PER_CLIP, name_fields(experiment), ends(experiment), asked, manifest])


def read_scores(file: Path) -> dict[str, RunScores]:
    """Key -> scores of each run in a file; none if there is no such file.

    Raises:
        ValueError: if it is damaged.
    """
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        values = {name: np.array(rows, dtype=np.float64) for name, rows in kept["values"].items()}
        return {
            key: RunScores(
                **{about: one[about] for about in ABOUT},
                rows={row: ClipScores(values[name], one["predictions"]) for row, name in one["rows"].items()},
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
    """Write a file of runs by key. Rows that are equal, as an oracle's under every seed, are kept once."""
    values: dict[str, list[list[float | None]]] = {}
    entries = {}
    for key, run in runs.items():
        rows = {}
        for row, scores in run.rows.items():
            plain = [[None if np.isnan(value) else value for value in clip] for clip in scores.values.tolist()]
            rows[row] = digest(plain)[:16]
            values[rows[row]] = plain
        (predictions,) = {scores.predictions for scores in run.rows.values()}
        entries[key] = {**{about: getattr(run, about) for about in ABOUT}, "predictions": predictions, "rows": rows}
    lines = ",\n".join(f'"{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in values.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(f'{{"metrics": {json.dumps(PER_CLIP)},\n"runs": {json.dumps(entries, indent=1)},\n"values": {{\n{lines}\n}}}}\n')
    part.replace(file)
