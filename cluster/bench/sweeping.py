"""Halving against the full grid: the same trials twice, what each way cost, and whether halving names the trial that the grid names.

The full grid measures its trials at the rungs, too, and stops none. So what halving would have decided on other clips of `val` is known
without training: each resample draws clips with replacement, takes the decisions on their errors, and names the best of the trials that
are left, by the sweep's first metric on clips that are drawn as well.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.evaluation.rows import MODEL
from cluster.evaluation.rung import read_rung
from cluster.runs.saved import open_run
from cluster.storage import NotFound
from cluster.studies.comparison import run_scores
from cluster.studies.halving import Halving, Standing, choose
from cluster.studies.kept_scores import ClipScores
from cluster.studies.search import Search
from cluster.studies.searchers import Mode, best_of
from cluster.studies.sweep import OpenSweep, Sweep
from cluster.studies.tuner import Show, run_sweep
from cluster.telemetry.books_log import read_books
from cluster.telemetry.receipt import receipt
from reactdiff.data.keyed import generator
from reactdiff.metrics.partial import means_to_metrics

SECONDS = "bench-seconds.json"
"""In a sweep's folder: what its commands took so far."""

RESAMPLES = 1000
"""Of the clips, for an interval."""


@dataclass(frozen=True)
class SweepCost:
    """What a sweep took.

    Attributes:
        items: that all its runs trained on, of both stages, what was trained twice or beyond a late decision included.
        seconds: of its commands, by the clock.
        trained: trials that came to their end.
    """

    items: int
    seconds: float
    trained: int


@dataclass(frozen=True)
class Named:
    """What halving names on one resample of the clips.

    Attributes:
        trial: its number.
        difference: interval of its metric less that of the grid's first one, paired by clip; of the one itself (0, 0).
    """

    trial: int
    difference: tuple[float, float]

    @property
    def as_good(self) -> bool:
        """Whether it is the grid's first one, or nobody can tell them apart."""
        low, high = self.difference
        return low <= 0 <= high


@dataclass(frozen=True)
class HalvingBench:
    """Both ways under one seed.

    Attributes:
        full: the grid.
        halved: the same with halving.
        first: the trial that is first at the grid's end.
        named: by halving, on each resample.
        smaller: how many times smaller pairing made the variance, at each decision of the sweep that was halved.
    """

    full: SweepCost
    halved: SweepCost
    first: int
    named: list[Named]
    smaller: list[float]


def bench_halving(
    sweep: Sweep, overrides: Sequence[str], folder: str, resamples: int, say: Callable[[str], None], show: Show
) -> HalvingBench:
    """Run a sweep with its halving and without, each in a store of its own; what was run before is taken up.

    Args:
        sweep: a grid with halving.
        overrides: of the experiment, `key=value`.
        folder: of both stores.
        resamples: of the clips.
        say: shows a line.
        show: shows how a sweep stands.
    """
    assert sweep.halving is not None
    rungs = [f"evaluation.rungs={list(sweep.halving.rungs)}", f"evaluation.rung_clips={sweep.halving.clips}"]
    grid = sweep.model_copy(update={"halving": None})
    full, full_cost = _swept(grid, [*overrides, *rungs, f"run.store={folder}/full"], say, show)
    halved, halved_cost = _swept(sweep, [*overrides, f"run.store={folder}/halved"], say, show)
    numbers = sorted(full.ledger.trials)
    errors = {number: _errors(full, number, sweep.halving) for number in numbers}
    scores = {number: _scores(full, number) for number in numbers}
    metric, mode = sweep.first_metric, sweep.metrics[sweep.first_metric]
    first = best_scored(scores, numbers, metric, mode)
    each = names(sweep.halving, errors, scores, metric, mode, resamples)
    named = [Named(one, difference(scores[one], scores[first], metric)) for one in each]
    choices = [choice for record in halved.ledger.trials.values() for choice in record.choices.values()]
    return HalvingBench(full_cost, halved_cost, first, named, [choice.smaller for choice in choices if choice.smaller is not None])


def names(
    halving: Halving,
    errors: Mapping[int, Mapping[int, np.ndarray]],
    scores: Mapping[int, ClipScores],
    metric: str,
    mode: Mode,
    resamples: int,
) -> list[int]:
    """The trial that halving names on each resample of the clips.

    Args:
        halving: the rule.
        errors: trial -> rung -> error of each clip, (clips,).
        scores: trial -> what it scored at its end.
        metric: by which the best is chosen.
        mode: "max" or "min".
        resamples: how many.
    """
    found = []
    for number in range(resamples):
        chance = generator("bench sweep", number)
        some = next(iter(next(iter(errors.values())).values()))
        # A clip that is drawn several times is one sample that weighs more: its sign is flipped once.
        clips, times = np.unique(chance.integers(len(some), size=len(some)), return_counts=True)
        again = {trial: {rung: times * one[clips] for rung, one in each.items()} for trial, each in errors.items()}
        standings = {trial: Standing("", each, {}, "DONE") for trial, each in again.items()}
        choose(halving, standings)
        left = [trial for trial, standing in standings.items() if standing.stopped_at is None]
        rows = len(next(iter(scores.values())).values)
        drawn = chance.integers(rows, size=rows)
        scored = {trial: ClipScores(one.values[drawn], one.predictions) for trial, one in scores.items()}
        found.append(best_scored(scored, left, metric, mode))
    return found


def best_scored(scores: Mapping[int, ClipScores], among: Sequence[int], metric: str, mode: Mode) -> int:
    """The trial of these with the best value of a metric.

    Raises:
        ValueError: if none has one.
    """
    if (found := best_of({trial: scores[trial].metrics()[metric] for trial in among}, mode)) is None:
        raise ValueError(f"no trial of {', '.join(map(str, among))} has a defined {metric}: choose another metric of the sweep")
    return found


def difference(one: ClipScores, other: ClipScores, metric: str) -> tuple[float, float]:
    """95 % bootstrap interval of a metric's difference over the clips, which both scored in the same order."""
    draws = [generator("paired", number).integers(len(one.values), size=len(one.values)) for number in range(RESAMPLES)]
    means = [np.stack([scores.values[draw].mean(0) for draw in draws]) for scores in (one, other)]
    ours, theirs = (means_to_metrics(values, one.predictions)[metric] for values in means)
    low, high = np.nanquantile(ours - theirs, (0.025, 0.975)).tolist()
    return low, high


def _swept(sweep: Sweep, overrides: Sequence[str], say: Callable[[str], None], show: Show) -> tuple[Search, SweepCost]:
    store = OpenSweep(sweep, overrides).store
    try:
        kept = json.loads(store.read(SECONDS))
    except NotFound:
        kept = {"seconds": 0.0, "over": False}
    began, over = time.monotonic(), False
    try:
        search, undone = run_sweep(sweep, overrides, say, show)
        over = search.over()
    finally:  # a command that was interrupted has taken its time, too
        if not kept["over"]:
            kept = {"seconds": kept["seconds"] + time.monotonic() - began, "over": over}
            store.put(SECONDS, json.dumps(kept).encode())
    if undone or not search.over():
        reasons = "; ".join(f"trial {number}: {one.why}" for number, one in undone.items())
        raise RuntimeError(f"sweep {sweep.name} is not at its end ({reasons}): the same command goes on")
    firsts = {trial.first.run.name for number in search.ledger.trials if (trial := search.trial(number)).first}
    runs = [*(record.run for record in search.ledger.trials.values()), *sorted(firsts)]
    items = sum(sum(receipt(read_books(search.opened.home.at(f"runs/{run}")))["items"].values()) for run in runs)
    return search, SweepCost(items, kept["seconds"], len(search.candidates()))


def _errors(search: Search, number: int, halving: Halving) -> Mapping[int, np.ndarray]:
    """Rung -> error of each clip, as halving would see it of a trial that the ledger has no rungs of."""
    record = search.ledger.trials[number]
    measured = [read_rung(search.opened.home.at(f"runs/{record.run}"), items, halving.clips) for items in halving.rungs]
    return replace(record, rungs={rung: one for rung, one in enumerate(measured) if one}).standing.errors


def _scores(search: Search, number: int) -> ClipScores:
    return run_scores(open_run(search.ledger.trials[number].run, search.opened.home.url)).rows[MODEL]
