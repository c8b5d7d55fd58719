"""How far rows of a comparison are from one of them, clip by clip and seed by seed: what both find hard or easy cancels out."""

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.studies.comparison_table import TableRow
from reactdiff.data.keyed import generator
from reactdiff.metrics.intervals import percentiles

METRICS = {"FRCorr ↑": ("FRCorr", 3), "energy score ↓": ("EnergyScore", 4), "FRDist ↓": ("FRDist", 1)}
"""Heads of the table, each with a metric that is a mean over clips, and its digits."""

RESAMPLES = 2000


def row_difference(row: TableRow, other: TableRow, metric: str) -> tuple[float, float, float]:
    """The mean difference of a metric, row minus other, over the seeds that both have, and its 95 % interval.

    A resample draws seeds and clips anew, with replacement (percentile bootstrap; Efron, 1979).
    """
    seeds = sorted(row.seeds.keys() & other.seeds.keys())
    each = np.stack([row.seeds[seed].columns(metric)[:, 0] - other.seeds[seed].columns(metric)[:, 0] for seed in seeds])
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        draw = generator("pairs", number)
        some, clips = draw.integers(len(each), size=len(each)), draw.integers(each.shape[1], size=each.shape[1])
        means[number] = each[np.ix_(some, clips)].mean()
    return float(each.mean()), *percentiles(means, 0.95)


def pairs_markdown(rows: Mapping[str, TableRow], against: Sequence[str]) -> str:
    """A table of the differences of every trained model from each of these rows, in Markdown; what excludes 0 is bold."""
    lines = [["", *(f"{head} against {base}" for base in against for head in METRICS)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, row in rows.items():
        if row.chunk is not None:
            lines.append([name, *(_said(row, rows[base], *METRICS[head]) if base != name else "" for base in against for head in METRICS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _said(row: TableRow, other: TableRow, metric: str, digits: int) -> str:
    mean, low, high = row_difference(row, other, metric)
    said = f"{mean:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"
    return f"**{said}**" if low > 0 or high < 0 else said
