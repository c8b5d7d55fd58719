"""One page about a sweep, from its ledger alone: its trials, their errors at the rungs, what matters, and what scores cost each other."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from cluster.evaluation.html import render, svg
from cluster.studies.ledger import TrialRecord
from cluster.studies.search import Search
from cluster.studies.searchers import Mode, defined
from cluster.studies.sweep_table import cost_lines, importances, rung_lines, sweep_cells, sweep_title
from reactdiff.metrics.official import OFFICIAL

REPORT = "report.html"

BEST, OTHER, STOPPED = "#c0392b", "#2f7d4f", "#b9c1cb"
"""Colours of the best trial, of others that reached their end or go on, and of those that halving stopped."""

BETTER: dict[str, Mode] = {"FRCorr": "max", "FRDist": "min", "FRDiv": "max", "FRVar": "max", "FRDvs": "max", "FRSyn": "min"}
"""Which way is better, where the sweep's file does not say; of diversity noise has most, so it is looked at beside FRCorr and FRDist."""


def write_sweep_report(search: Search, states: Mapping[int, str]) -> str:
    """Make the page of a sweep as it is now, and keep it in its folder; returns its URL."""
    store = search.opened.store
    store.put(REPORT, sweep_report(search, states).encode())
    return f"{store.url}/{REPORT}"


def sweep_report(search: Search, states: Mapping[int, str]) -> str:
    """The page.

    Args:
        search: the sweep.
        states: of trials beside the ledger, as `sweep_table` takes them.
    """
    heads, rows = sweep_cells(search, states, {})
    best = search.best()
    records = [search.ledger.trials[number] for number in sorted(search.ledger.trials)]
    title, shares = importances(search)
    return render(
        Path(__file__).with_name("sweep_report.html"),
        name=f"sweep {search.opened.sweep.name}",
        title=sweep_title(search),
        heads=heads,
        rows=[(_kind(record, best), row) for record, row in zip(records, rows, strict=True)],
        notes=[*rung_lines(search), *cost_lines(search)],
        rungs=_rung_curves(records, best),
        infinite=sum(not all(map(record.finite, record.rungs)) for record in records),
        importance=_bars(shares) if shares else "",
        what=title,
        fronts=_fronts(search, best),
        first=search.opened.sweep.first_metric,
        config=search.opened.winner(best.point) if best else "",
    )


def _kind(record: TrialRecord, best: TrialRecord | None) -> str:
    return "best" if record is best else "out" if record.standing.stopped_at is not None or record.end == "FAILED" else ""


def _colour(record: TrialRecord, best: TrialRecord | None) -> str:
    return {"best": BEST, "out": STOPPED, "": OTHER}[_kind(record, best)]


def _rung_curves(records: list[TrialRecord], best: TrialRecord | None) -> str:
    """The error of each trial at its rungs, where it is finite: one that is not would flatten all others. Nothing without halving."""
    measured = [record for record in records if any(map(record.finite, record.rungs))]
    if not measured:
        return ""
    figure = Figure((9.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for record in sorted(measured, key=lambda record: (record is best, record.standing.stopped_at is None)):  # the best one on top
        stopped, colour = record.standing.stopped_at, _colour(record, best)
        there = sorted(rung for rung in record.rungs if record.finite(rung) and (stopped is None or rung <= stopped))
        if not there:
            continue
        points = [(record.rungs[rung]["progress"], record.error(rung)) for rung in there]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=2 if record is best else 1)
        if stopped in there:
            axes.plot(*points[-1], "x", color="#5a6675", markersize=7)
        axes.annotate(str(record.number), points[-1], xytext=(5, -3), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xlabel="items", ylabel="error of the decoded x0 prediction")
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure, "rungs")


def _bars(shares: Mapping[str, float]) -> str:
    figure = Figure((9.0, 0.5 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    axes.barh(names, [100 * shares[name] for name in names], color=OTHER, height=0.6)
    axes.set(xlabel="%", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure, "importance")


def _fronts(search: Search, best: TrialRecord | None) -> str:
    """The sweep's first metric against each other one, with the trials that no other trial beats in both joined by a line."""
    metrics, first = search.opened.sweep.metrics, search.opened.sweep.first_metric
    better = BETTER | metrics
    others = [name for name in dict.fromkeys((*metrics, *OFFICIAL)) if name != first]
    shown = {name: points for name in others if len(points := _points(search, first, name)) > 1}
    if not shown:
        return ""
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure((9.0, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, (name, points) in zip(panels, shown.items(), strict=False):
        for record, (across, up) in points:
            panel.plot(across, up, "o", color=_colour(record, best), markersize=4)
            panel.annotate(str(record.number), (across, up), xytext=(4, 3), textcoords="offset points", fontsize=7)
        edge = front([place for _, place in points], (better[name], better[first]))
        panel.plot(*zip(*edge, strict=True), color="#5a6675", linewidth=0.8, linestyle="--", zorder=0)
        panel.set(xlabel=name, ylabel=first)
        panel.spines[["top", "right"]].set_visible(False)
    return svg(figure, "fronts")


def _points(search: Search, first: str, other: str) -> list[tuple[TrialRecord, tuple[float, float]]]:
    """Of the trials that reached their end, both scores: across the other one, up the first."""
    found = [(record, defined(record.scores, (other, first))) for record in search.candidates()]
    return [(record, (values[0], values[1])) for record, values in found if values]


def front(points: list[tuple[float, float]], modes: tuple[Mode, Mode]) -> list[tuple[float, float]]:
    """The points that no other one is at least as good as in both and better than in one, from left to right."""
    signs = [1 if mode == "max" else -1 for mode in modes]

    def beaten(one: tuple[float, float]) -> bool:
        gains = [[sign * (b - a) for sign, a, b in zip(signs, one, other, strict=True)] for other in points]
        return any(min(gain) >= 0 and max(gain) > 0 for gain in gains)

    return sorted({point for point in points if not beaten(point)})
