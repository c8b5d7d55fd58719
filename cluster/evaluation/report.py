"""One page about a run, from its folder alone: curves, scores, a picture of reactions, where time and money went, configuration."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from cluster.evaluation.html import render, svg
from cluster.runs.state import read_state
from cluster.storage import NotFound, Store
from cluster.telemetry.books import BOOK_STATES
from cluster.telemetry.books_log import read_books
from cluster.telemetry.metrics_log import read_rows, validation_name
from cluster.telemetry.receipt import advice, receipt, receipt_lines
from reactdiff.config import STAGES
from reactdiff.metrics.official import OFFICIAL

REPORT = "report.html"

POINTS = 500
"""Most points of a curve."""

COLOURS = ("#8d99a8", "#2f7d4f", "#d98b1f", "#6a5fb0", "#3f8fc4", "#3fb8af", "#c0392b", "#e79a91", "#d5dae1", "#5c4a3d")
"""Of the states, in their order."""

SIZE = (9.0, 2.8)
"""Inches of a figure."""


def write_report(store: Store) -> str:
    """Make the report of a run as it is now, and keep it in its folder; returns its URL."""
    store.put(REPORT, report(store).encode())
    return f"{store.url}/{REPORT}"


def report(store: Store) -> str:
    """The page.

    Args:
        store: the run's folder.

    Raises:
        ValueError: if no run was begun there.
    """
    if (state := read_state(store)) is None:
        raise ValueError(f"run {store.url} ended before it began (no state.json): start it again with jobs/train.py")
    records = read_books(store)
    made = receipt(records)
    lines = receipt_lines(made)
    return render(
        Path(__file__).with_name(REPORT),
        name=store.url.rpartition("/")[2],
        status=f"{state.status}{f': {state.why}' if state.why else ''}",
        work="; ".join(lines.about),
        verdict=advice(made),
        curves=[(title, _curve(title, found)) for title, found in _rows(store)],
        timeline=_timeline(records),
        books={"head": lines.head, "rows": lines.rows},
        faults=lines.faults,
        config=(config := store.read("config.yaml").decode()),
        **_scores(store, yaml.safe_load(config)["evaluation"]),
    )


def _rows(store: Store) -> list[tuple[str, list[tuple[float, dict[str, float]]]]]:
    """What is drawn over progress: of each stage the loss, and the scores of its checkpoints."""
    found = []
    for stage in STAGES:
        for title, name, columns in (
            (f"Loss of stage {stage}", stage, ("loss",)),
            (f"Scores of stage {stage} on clips of val", validation_name(stage), ("FRCorr", "FRDist")),
        ):
            if rows := read_rows(store, name):
                every = -(-len(rows) // POINTS)
                kept = [*rows[:-1:every], rows[-1]]
                found.append((title, [(row["progress"], {key: row[key] for key in columns if key in row}) for row in kept]))
    return found


def _curve(title: str, rows: Sequence[tuple[float, Mapping[str, float]]]) -> str:
    figure = Figure(SIZE, layout="constrained")
    columns = list(dict.fromkeys(key for _, values in rows for key in values))
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        points = [(progress, values[column]) for progress, values in rows if column in values]
        axes.plot(*zip(*points, strict=True), color="#2f7d4f", linewidth=1.2, marker="." if len(points) < 30 else "")
        axes.set(xlabel="items", ylabel=column)
        if column == "loss" and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure, title)


def _timeline(records: Sequence[Mapping[str, Any]]) -> str:
    """Workers by state over the minutes since the run began; a life without a driver is a gap."""
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    shown = [state for state in BOOK_STATES if any(state in span for one in records for span in one["timeline"]["spans"])]
    began = records[0]["began"] if records else 0
    named = set[str]()
    for record in records:
        span, spans = record["timeline"]["span"], record["timeline"]["spans"]
        if not spans:
            continue
        edges = [(record["began"] - began + span * place) / 60_000 for place in range(len(spans) + 1)]
        low = [0.0] * len(spans)
        for state in shown:
            high = [below + one.get(state, 0.0) / (span / 1000) for below, one in zip(low, spans, strict=True)]
            colour = COLOURS[BOOK_STATES.index(state)]
            label = None if state in named else state.replace("_", " ")
            axes.stairs(high, edges, baseline=low, fill=True, color=colour, label=label)
            named.add(state)
            low = high
    for record in records:
        for fault in record["faults"]:
            axes.axvline((fault["time"] - began) / 60_000, color="#c0392b", linewidth=0.8, linestyle="--")
            axes.annotate(fault["fault"], ((fault["time"] - began) / 60_000, 1), xycoords=("data", "axes fraction"), fontsize=7)
    axes.set(xlabel="minutes", ylabel="workers", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return svg(figure, "timeline")


def _scores(store: Store, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the evaluation that the configuration asks for, or of another where there is none, and its picture where one is kept."""
    nothing = {"scores": [], "metrics": [], "split": "", "clips": 0, "predictions": 0, "picture": ""}
    names = [entry.key for entry in store.list("evaluation/") if entry.key.count("/") == 1 and entry.key.endswith(".json")]
    found = [(json.loads(store.read(name)), name) for name in names]
    if not found:
        return nothing

    def fits(one: tuple[dict[str, Any], str]) -> list[bool]:
        return [not one[0].get("otherwise"), *(one[0][key] == asked[key] for key in ("split", "predictions"))]

    values, name = max(found, key=fits)
    rows = [(row, [_number(one["official"][metric]) for metric in OFFICIAL]) for row, one in values["scores"].items()]
    try:
        picture = base64.b64encode(store.read(name.removesuffix(".json") + ".png")).decode()
    except NotFound:
        picture = ""
    facts = {key: values[key] for key in ("split", "clips", "predictions")}
    return {**nothing, **facts, "scores": rows, "metrics": OFFICIAL, "picture": picture}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
