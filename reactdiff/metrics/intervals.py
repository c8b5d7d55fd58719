"""How far the metrics of a split would vary with its clips: bootstrap confidence intervals."""

import math
from collections.abc import Iterable

import numpy as np

from reactdiff.data.keyed import generator
from reactdiff.metrics.partial import PartialScores, means_to_metrics


def intervals(parts: Iterable[PartialScores], seed: int = 0, resamples: int = 1000, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals (Efron, 1979) of the metrics that are means over clips.

    A resample draws as many clips as there are, with replacement. A clip here is a scored row; rows that share a script are
    treated as if they were independent. Rows are sorted first, so neither the split into parts nor their order matters. FRDvs and
    FrechetAttributes compare whole sets, whose resamples would hold the same clip twice: they have no interval.

    Args:
        parts: of one evaluation, each once.
        seed: of the draws.
        resamples: how many.
        level: share of the resamples inside the interval, in (0, 1).

    Returns:
        Metric -> (low, high), official and repaired; NaN where it is undefined for every resample.

    Raises:
        ValueError: if there are no parts, or `level` or `resamples` make no interval.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level is {level} and resamples {resamples}: the level must lie between 0 and 1, and resamples be at least 1")
    parts = list(parts)
    if not parts:
        raise ValueError("there are no parts to make intervals from: score at least one clip")
    means = resampled_means(np.concatenate([part.values for part in parts]), seed, resamples)
    return {name: percentiles(values, level) for name, values in means_to_metrics(means, len(parts[0].mean)).items()}


def resampled_means(rows: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of rows (clips, columns) that are drawn with replacement, as many as there are, (resamples, columns); in any order alike."""
    rows = rows[np.lexsort(rows.T)]
    return np.stack([rows[generator("intervals", seed, number).integers(len(rows), size=len(rows))].mean(0) for number in range(resamples)])


def percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The middle of the resamples' values (resamples,), NaN aside; NaN where all are."""
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high
