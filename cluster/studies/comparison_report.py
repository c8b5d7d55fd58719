"""One page about a comparison: its table, and where its rows lie between variety and agreement."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cluster.evaluation.html import render, svg
from cluster.evaluation.rows import CUT
from cluster.storage import Store
from cluster.studies.comparison_table import FRONTIER, TableRow, beside, cells
from reactdiff.data.synthetic.oracles import frontier_names

REPORT = "report.html"


def write_comparison_report(home: Store, name: str, rows: Mapping[str, TableRow]) -> str:
    """Make the page, and keep it in the store of the runs; returns its URL."""
    key = f"comparisons/{name}/{REPORT}"
    home.put(key, comparison_report(name, rows).encode())
    return f"{home.url}/{key}"


def comparison_report(name: str, rows: Mapping[str, TableRow]) -> str:
    """The page.

    Args:
        name: of the comparison.
        rows: of its table.
    """
    heads, lines = cells(rows)
    figure = svg(frontier_figure(rows), "frontier")
    return render(Path(__file__).with_name("comparison_report.html"), name=name, heads=heads, rows=lines, frontier=figure)


def frontier_figure(rows: Mapping[str, TableRow]) -> Figure:
    """FRCorr against FRDiv, a point for each row with the spread of its seeds; means of 1, 2, 4 ... draws of an oracle are joined."""
    chunks = {0, *(row.chunk for row in rows.values() if row.chunk is not None)}
    curves = [names for names in map(frontier_names, sorted(chunks)) if all(name in rows for name in names)]
    unnamed = {name for names in curves for name in names[1:]} | {beside(CUT, name) for name in rows}  # or names hide each other
    figure = Figure((9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for names in curves:
        heights, places = zip(*(_middle(rows[name]) for name in names), strict=True)
        axes.plot(places, heights, color="#8d99a8", linewidth=1, marker=".", zorder=0)
    for name, row in rows.items():
        if name in unnamed:
            continue
        (up, across), (high, wide) = _middle(row), _deviation(row)
        colour = "#c0392b" if row.chunk is not None else "#5a6675"
        axes.errorbar(across, up, high, wide, fmt="o" if row.chunk is not None else "d", color=colour, markersize=4, linewidth=0.8)
        axes.annotate(name, (across, up), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour)
    axes.set(xlabel=FRONTIER[1], ylabel=FRONTIER[0])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _middle(row: TableRow) -> Sequence[float]:
    return np.mean(_seeds(row), axis=0).tolist()


def _deviation(row: TableRow) -> Sequence[float]:
    found = _seeds(row)
    return np.std(found, axis=0, ddof=1).tolist() if len(found) > 1 else [0.0, 0.0]


def _seeds(row: TableRow) -> list[list[float]]:
    return [[one.metrics()[metric] for metric in FRONTIER] for one in row.seeds.values()]
