"""What was measured, as tables: each figure beside its rival's."""

from collections.abc import Mapping, Sequence
from statistics import median

from rich.table import Column, Table

from cluster.bench.checkpoint import HeldUp, Seconds
from cluster.bench.loading import Figures
from cluster.bench.metrics import CLIPS, FRAMES, NEIGHBOURS, OFFICIAL_SECONDS, PREDICTIONS, FullSize, MetricCost
from cluster.bench.training import StepSpeed


def training_table(title: str, speeds: Mapping[str, StepSpeed]) -> Table:
    """A line for each stage."""
    table = _numbers(title, "stage", "items/s", "plain PyTorch", "ratio", "MFU", "peak memory")
    for name, speed in speeds.items():
        mfu = f"{speed.mfu:.1%}" if speed.mfu else "-"
        ratio, memory = f"{speed.items_per_second / speed.plain:.2f}", f"{speed.peak_memory / 1e9:.2f} GB"
        table.add_row(name, f"{speed.items_per_second:.2f}", f"{speed.plain:.2f}", ratio, mfu, memory)
    return table


def online_table(spent: list[float], window: float, count: int) -> Table:
    """A whole clip and its slowest window against real time.

    Args:
        spent: seconds of each window.
        window: seconds that a window lasts.
        count: listeners at the same time.
    """
    title = f"{count} listeners online, {len(spent)} windows of {window:g} s"
    table = _numbers(title, "", "seconds", "times faster than real time")
    for name, ours, theirs in (("whole clip", sum(spent), len(spent) * window), ("slowest window", max(spent), window)):
        table.add_row(name, f"{ours:.2f}", f"{theirs / ours:.1f}")
    return table


def loading_table(title: str, found: Mapping[str, Figures]) -> Table:
    """What was measured of every reader, each beside its ratio to the first."""
    (first, wire), *rest = found.items()
    table = _numbers(title, "", first, *(column for name, _ in rest for column in (name, f"/ {first}")))
    for what, digits in Figures.ROWS.items():
        cells = [f"{median(wire.each(what)):.{digits}f}"]
        for _, figures in rest:
            ratios = [ours / theirs for ours, theirs in zip(figures.each(what), wire.each(what), strict=True)]
            cells += [f"{median(figures.each(what)):.{digits}f}", f"{median(ratios):.2f}"]
        table.add_row(what, *cells)
    return table


def checkpoint_table(title: str, found: HeldUp) -> Table:
    """What holds up a step, beside a plain copy: the first checkpoint by itself, then medians of the others."""
    table = _numbers(title, "", "ms", "CPU ms", "/ copy", "CPU / copy", "first, ms", "first, / copy")
    parts = {"begin": found.begin, "publish": found.publish, "finish": found.finish}
    together = [Seconds(sum(one.wall for one in each), sum(one.cpu for one in each)) for each in zip(*parts.values(), strict=True)]
    rounds = {"copy": found.copy, **parts, "together": together}
    for name, spent in rounds.items():
        wall, cpu = median(one.wall for one in spent[1:]), median(one.cpu for one in spent[1:])
        ratios = [median(ours[kind] / copy[kind] for ours, copy in zip(spent[1:], found.copy[1:], strict=True)) for kind in (0, 1)]
        first = f"{1e3 * spent[0].wall:.1f}", f"{spent[0].wall / found.copy[0].wall:.2f}"
        table.add_row(name, f"{1e3 * wall:.1f}", f"{1e3 * cpu:.1f}", *(f"{ratio:.2f}" for ratio in ratios), *first)
    return table


def pairs_table(costs: Sequence[MetricCost]) -> Table:
    """A line for each metric and kind of reactions, beside the challenges' code."""
    title = f"CPU time on one core, {FRAMES} frames, {PREDICTIONS} predictions"
    table = _numbers(title, "metric", "per", "neighbours", "reactions", "ms", "official, ms", "ratio")
    for cost in costs:
        unit, neighbours = ("prediction", "-") if cost.metric == "FRSyn" else ("pair", str(cost.neighbours))
        ours, theirs = f"{cost.seconds * 1e3:.3f}", f"{OFFICIAL_SECONDS[cost.metric] * 1e3:.1f}"
        table.add_row(cost.metric, unit, neighbours, cost.reactions, ours, theirs, f"{cost.speedup:.0f}")
    return table


def full_size_table(full: FullSize, cores: int) -> Table:
    """A set of the size of the challenges' test set."""
    title = f"{CLIPS} clips, {PREDICTIONS} predictions, {NEIGHBOURS} neighbours, on {cores} cores"
    table = _numbers(title, "wall, s", "CPU, s", "making the reactions, CPU s", "official, CPU s", "ratio", "peak memory")
    ratio = full.official / (full.cpu - full.making)
    seconds = (f"{value:.0f}" for value in (full.wall, full.cpu, full.making, full.official, ratio))
    table.add_row(*seconds, f"{full.memory / 1e9:.2f} GB")
    return table


def _numbers(title: str, *columns: str) -> Table:
    return Table(*(Column(name, justify="right") for name in columns), title=title, title_justify="left")
