"""What was measured, as tables: each figure beside its rival's."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Column, Table

from cluster.bench.checkpoint import HeldUp, Seconds
from cluster.bench.loading import Figures
from cluster.bench.metrics import CLIPS, CLIPS_TIMED, FRAMES, NEIGHBOURS, PART, PREDICTIONS, FullSize, MetricCost, SetCost
from cluster.bench.rival import Cost
from cluster.bench.startup import Startup
from cluster.bench.training import StepSpeed

if TYPE_CHECKING:  # it imports Ray Tune
    from cluster.bench.sweeping import HalvingBench


def training_table(title: str, speeds: Mapping[str, StepSpeed]) -> Table:
    """A line for each stage."""
    table = _numbers(title, "stage", "items/s", "plain PyTorch", "ratio", "MFU", "peak memory", "telemetry")
    for name, speed in speeds.items():
        mfu = f"{speed.mfu:.1%}" if speed.mfu else "-"
        ratio, memory = f"{speed.items_per_second / speed.plain:.2f}", f"{speed.peak_memory / 1e9:.2f} GB"
        told = f"{speed.telemetry:+.2%}"
        table.add_row(name, f"{speed.items_per_second:.2f}", f"{speed.plain:.2f}", ratio, mfu, memory, told)
    return table


def online_table(spent: list[float], chunk: float, count: int) -> Table:
    """A whole clip and its chunks against real time.

    Args:
        spent: seconds of each chunk.
        chunk: seconds that a chunk lasts.
        count: listeners at the same time.
    """
    title = f"{count} listeners online, {len(spent)} chunks of {chunk:g} s"
    table = _numbers(title, "", "seconds", "times faster than real time")
    chunks = {"median chunk": median(spent), "99 of 100 chunks": float(np.quantile(spent, 0.99)), "slowest chunk": max(spent)}
    for name, ours, theirs in (("whole clip", sum(spent), len(spent) * chunk), *((name, each, chunk) for name, each in chunks.items())):
        table.add_row(name, f"{ours:.3f}", f"{theirs / ours:.1f}")
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
    """What holds up a step, beside a plain copy: least wall time and median CPU time, and what the first checkpoint took."""
    table = _numbers(title, "", "ms, least", "/ copy", "CPU ms, median", "/ copy", "first, ms", "/ copy")
    parts = {"begin": found.begin, "publish": found.publish, "finish": found.finish}
    together = [Seconds(sum(one.wall for one in each), sum(one.cpu for one in each)) for each in zip(*parts.values(), strict=True)]
    for name, spent in {"copy": found.copy, **parts, "together": together}.items():
        cells = []
        for figure in (_least_wall, _median_cpu, _first_wall):
            ours, copy = figure(spent), figure(found.copy)
            cells += [f"{1e3 * ours:.1f}", f"{ours / copy:.2f}"]
        table.add_row(name, *cells)
    return table


def startup_tables(rounds: int, found: Mapping[str, Sequence[Startup]]) -> tuple[Table, Table]:
    """Both ends of a command; the last one is the rival."""
    first = {name: [one.to_first_step for one in each] for name, each in found.items()}
    last = {name: [one.from_last_step for one in each] for name, each in found.items()}
    return (
        seconds_table(f"from the command to the end of its first step, {rounds} rounds", first),
        seconds_table(f"from the last step to the command's end, {rounds} rounds", last),
    )


def seconds_table(title: str, found: Mapping[str, Sequence[float]]) -> Table:
    """Seconds of each, over all times they were measured; the last one is the rival."""
    table = _numbers(title, "", "median, s", "least", "most", "ratio of medians")
    *_, rival = found.values()
    for name, seconds in found.items():
        figures = (median(seconds), min(seconds), max(seconds))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), f"{median(seconds) / median(rival):.2f}")
    return table


def halving_table(title: str, found: Mapping[int, "HalvingBench"]) -> Table:
    """By seed: items and time of the grid and with halving, how often halving named the grid's first trial or one as good, and pairing."""
    costs = ("grid, items", "halved", "ratio", "grid, s", "halved", "ratio")
    table = _numbers(title, "seed", *costs, "to the end", "named", "or as good", "pairing")
    for seed, one in found.items():
        pairs = [(one.full.items, one.halved.items), (round(one.full.seconds), round(one.halved.seconds))]
        cells = [f"{figure}" for full, half in pairs for figure in (full, half, f"{half / full:.2f}")]
        same = sum(name.trial == one.first for name in one.named)
        good, tries = sum(name.as_good for name in one.named), len(one.named)
        smaller = f"{median(one.smaller):.1f} x less" if one.smaller else "no decision"
        table.add_row(str(seed), *cells, f"{one.halved.trained} of {one.full.trained}", f"{same} of {tries}", f"{good} of {tries}", smaller)
    return table


def rivalry_table(title: str, found: Mapping[str, Sequence[Cost]]) -> Table:
    """What each took in the median of the rounds; how many times less the first took in each of them, and the least and most of that."""
    table = _numbers(title, "", *found, "ratio", "least", "most")
    for name, unit, figure in (("seconds", 1.0, "wall"), ("CPU seconds", 1.0, "cpu"), ("peak memory, GB", 1e9, "memory")):
        each = {role: [getattr(cost, figure) / unit for cost in costs] for role, costs in found.items()}
        ours, theirs = each.values()
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        medians = (f"{median(costs):.2f}" for costs in each.values())
        table.add_row(name, *medians, *(f"{ratio:.2f}" for ratio in (median(ratios), min(ratios), max(ratios))))
    return table


def _least_wall(rounds: Sequence[Seconds]) -> float:
    return min(one.wall for one in rounds[1:])


def _median_cpu(rounds: Sequence[Seconds]) -> float:
    return median(one.cpu for one in rounds[1:])


def _first_wall(rounds: Sequence[Seconds]) -> float:
    return rounds[0].wall


def pairs_table(costs: Sequence[MetricCost]) -> Table:
    """A line for each metric and kind of reactions, beside the challenges' way."""
    title = f"CPU time on one core, {FRAMES} frames, {PREDICTIONS} predictions, medians of {CLIPS_TIMED} clips"
    table = _numbers(title, "metric", "per", "neighbours", "reactions", "ms", "challenges' way, ms", "ratio")
    for cost in costs:
        unit, neighbours = ("prediction", "-") if cost.metric == "FRSyn" else ("pair", str(cost.neighbours))
        milliseconds = f"{1e3 * cost.ours:.3f}", f"{1e3 * cost.challenge:.2f}"
        table.add_row(cost.metric, unit, neighbours, cost.reactions, *milliseconds, f"{cost.challenge / cost.ours:.0f}")
    return table


def set_table(cost: SetCost) -> Table:
    """A line for each metric of one set, and one for what all of them took."""
    title = f"{CLIPS_TIMED} clips, {PREDICTIONS} predictions, {NEIGHBOURS} neighbours, scored whole"
    table = _numbers(title, "metric", "value", "challenges' way", "CPU ms", "challenges' way, ms", "ratio")
    for metric, seconds in cost.challenge.items():
        table.add_row(metric, *(f"{value:.7g}" for value in cost.values[metric]), "", f"{1e3 * seconds:.0f}", "")
    theirs = sum(cost.challenge.values())
    table.add_row("all", "", "", f"{1e3 * cost.ours:.0f}", f"{1e3 * theirs:.0f}", f"{theirs / cost.ours:.0f}")
    return table


def full_size_table(full: FullSize, cores: int) -> Table:
    """A set of the size of the challenges' test set."""
    title = (
        f"{CLIPS} clips, {PREDICTIONS} predictions, {NEIGHBOURS} neighbours, on {cores} cores; the challenges' way is scaled from the "
        f"first {PART} clips, {full.part:.1f} CPU s: FRCorr and FRDist by pairs, FRDiv, FRVar and FRSyn by clips, and FRDvs left out"
    )
    table = _numbers(title, "wall, s", "CPU, s", "making the reactions, CPU s", "challenges' way, CPU s", "ratio", "peak memory")
    ratio = full.challenge / (full.cpu - full.making)
    seconds = (f"{value:.0f}" for value in (full.wall, full.cpu, full.making, full.challenge, ratio))
    table.add_row(*seconds, f"{full.memory / 1e9:.2f} GB")
    return table


def _numbers(title: str, *columns: str) -> Table:
    return Table(*(Column(name, justify="right") for name in columns), title=title, title_justify="left")
