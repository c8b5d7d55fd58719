"""How far rows of a comparison are from one of them, clip by clip and seed by seed: what both find hard or easy cancels out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cluster.evaluation.rows import CUT
from cluster.studies.comparison_table import TableRow, beside
from reactdiff.data.keyed import generator
from reactdiff.metrics.intervals import percentiles

METRICS = {"FRCorr ↑": ("FRCorr", 3), "energy score ↓": ("EnergyScore", 4), "FRDist ↓": ("FRDist", 1)}
"""Heads of the table, each with a metric that is a mean over clips, and its digits."""

RESAMPLES = 2000


class Difference(NamedTuple):
    """How far a row is from another one in a metric.

    Attributes:
        mean: row minus other.
        low, high: its 95 % interval.
        seeds_agree: whether it has one sign under every one of several seeds, over several groups of clips.
    """

    mean: float
    low: float
    high: float
    seeds_agree: bool


def independent_groups(appropriate: np.ndarray) -> np.ndarray:
    """The group of each of a split's items: those that share a recording or a reference are no independent evidence.

    Args:
        appropriate: (2n, 2n) bool, which items' reactions are appropriate to which; items i and i + n are one recording.

    Returns:
        (2n,) int, groups numbered from 0.
    """
    items = np.arange(len(appropriate))
    linked = appropriate | appropriate.T | (items[:, None] % (len(items) // 2) == items % (len(items) // 2))
    least = items
    while (lower := np.where(linked, least, len(items)).min(axis=1)).tolist() != least.tolist():
        least = lower
    return np.unique(least, return_inverse=True)[1]


def row_difference(row: TableRow, other: TableRow, metric: str, groups: np.ndarray) -> Difference:
    """The difference of a metric over the seeds that both rows have.

    A resample draws seeds and groups of clips anew, with replacement (percentile bootstrap of clusters; Davison and Hinkley, 1997,
    section 3.8). Of few seeds and groups such an interval is too narrow: hence the second condition.
    """
    seeds = sorted(row.seeds.keys() & other.seeds.keys())
    assert len(groups) == len(next(iter(row.seeds.values())).values), "each clip has its group"
    each = np.stack([row.seeds[seed].columns(metric)[:, 0] - other.seeds[seed].columns(metric)[:, 0] for seed in seeds])
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        draw = generator("pairs", number)
        some, drawn = draw.integers(len(each), size=len(each)), draw.integers(len(members), size=len(members))
        means[number] = each[np.ix_(some, np.concatenate([members[group] for group in drawn]))].mean()
    signs = set(np.sign(each.mean(axis=1)).tolist())
    return Difference(float(each.mean()), *percentiles(means, 0.95), seeds_agree=len(signs) == 1 < min(len(each), len(members)))


def pairs_markdown(rows: Mapping[str, TableRow], against: Sequence[str], groups: np.ndarray) -> str:
    """A table of the differences of every trained model from each of these rows, in Markdown; with units cut, from theirs with units cut.

    Bold is what excludes 0 and has one sign under every seed.
    """
    cut = {beside(CUT, model): {base: beside(CUT, base) for base in against} for model in rows}
    lines = [["", *(f"{head} against {base}" for base in against for head in METRICS)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, row in rows.items():
        if row.chunk is not None:
            bases = [cut[name][base] if name in cut else base for base in against]
            cells = [(rows.get(base) if base != name else None, *METRICS[head]) for base in bases for head in METRICS]
            lines.append([name, *(_said(row, base, metric, digits, groups) if base else "" for base, metric, digits in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _said(row: TableRow, other: TableRow, metric: str, digits: int, groups: np.ndarray) -> str:
    mean, low, high, seeds_agree = row_difference(row, other, metric, groups)
    said = f"{mean:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"
    return f"**{said}**" if seeds_agree and (low > 0 or high < 0) else said
