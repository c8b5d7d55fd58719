"""The metrics of models and baselines side by side, for people."""

import math
import sys
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from reactdiff.metrics.official import OFFICIAL, Scores

# Which way is better. The diversity metrics have no arrow: noise has the most of all three.
ARROWS = {"FRCorr": "↑", "FRDist": "↓", "FRSyn": "↓"}
# What stands below each official metric: heading and name.
BELOW = {
    "FRCorr": ("each", "FRCorr_per_prediction"),
    "FRDist": ("each", "FRDist_per_prediction"),
    "FRDvs": ("Frechet ↓", "FrechetAttributes"),
    "FRSyn": ("varying", "FRSyn_varying"),
}


LOG_WIDTH = 110


def table(rows: Mapping[str, Scores], title: str = "Official metrics") -> Table:
    """A line for each model or baseline with the official metrics; below, their repaired twins and the Frechet distance, then intervals.

    Args:
        rows: name -> scores, in the order of the lines.
        title: above the table.
    """
    caption = "FRDist rewards timid reactions and FRDiv, FRVar and FRDvs noisy ones: read them together."
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


def _interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None or math.isnan(bounds[0]):
        return ""
    digits = 2 if abs(bounds[1]) < 10 else 1
    return f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}"


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
