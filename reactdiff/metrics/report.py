"""The metrics of models and baselines side by side, for people."""

import math
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from reactdiff.metrics.official import OFFICIAL, Scores
from reactdiff.metrics.partial import ROUGHNESS

# Which way is better. The diversity metrics have no arrow: noise has the most of all three.
ARROWS = {"FRCorr": "↑", "FRDist": "↓", "FRSyn": "↓"}
# What stands below each official metric: heading and name.
BELOW = {
    "FRCorr": ("each", "FRCorr_per_prediction"),
    "FRDist": ("each", "FRDist_per_prediction"),
    "FRDvs": ("Frechet ↓", "FrechetAttributes"),
    "FRSyn": ("varying", "FRSyn_varying"),
}

# What stands below those, as many as there are official metrics: headings and names; of several the largest is shown.
BESIDE = {
    "Energy ↓": ("EnergyScore",),
    "frame ↓": ("EnergyScore_frame",),
    "step": ROUGHNESS[:1],
    "at ends": ROUGHNESS[1:],
    "of mean": ("FRCorr_of_mean",),
    "no mouth": ("FRCorr_no_mouth",),
}

LOG_WIDTH = 110


def table(rows: Mapping[str, Scores], title: str = "Official metrics") -> Table:
    """A line for each model or baseline with the official metrics; below, their repaired twins, what they cannot tell, and intervals.

    Args:
        rows: name -> scores, in the order of the lines.
        title: above the table.
    """
    caption = (
        "FRDist rewards timid reactions, FRDiv, FRVar and FRDvs noisy ones, FRCorr averages: the energy score none of them. "
        "Steps from frame to frame are divided by the real ones."
    )
    lines = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    lines.add_column("")
    for metric in OFFICIAL:
        lines.add_column(f"{metric} {ARROWS.get(metric, '')}".strip(), justify="right")
    for name, scores in rows.items():
        lines.add_row(name, *(_number(scores.official[metric]) for metric in OFFICIAL))
    lines.add_section()
    lines.add_row("repaired", *(BELOW[metric][0] if metric in BELOW else "" for metric in OFFICIAL), style="dim")
    for name, scores in rows.items():
        below = scores.repaired | scores.extra
        lines.add_row(name, *(_number(below[BELOW[metric][1]]) if metric in BELOW else "" for metric in OFFICIAL))
    lines.add_section()
    lines.add_row("beside them", *BESIDE, style="dim")
    for name, scores in rows.items():
        lines.add_row(name, *(_number(largest([scores.extra[metric] for metric in metrics])) for metrics in BESIDE.values()))
    lines.add_section()
    lines.add_row("95 %", style="dim")
    for name, scores in rows.items():
        lines.add_row(name, *(_interval(scores.intervals.get(metric)) for metric in OFFICIAL))
    return lines


def print_table(rows: Mapping[str, Scores]) -> None:
    """The table on stdout; in a log, which has no width, wide enough for a line each."""
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table(rows))


def gap_closed(model: float, low: float, high: float) -> float:
    """How far a model has come from a baseline (0) to an ideal (1), on a metric of either direction.

    Raises:
        ValueError: if baseline and ideal are equal or not finite, so that there is no way to go.
    """
    if not math.isfinite(high - low) or high == low:
        raise ValueError(f"there is no gap between the baseline's {low} and the ideal's {high}: give two different, finite scores")
    return (model - low) / (high - low)


def largest(values: Sequence[float]) -> float:
    """The largest of some values that are not NaN; NaN if all are."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None or math.isnan(bounds[0]):
        return ""
    digits = 2 if abs(bounds[1]) < 10 else 1
    return f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}"


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
