"""Which point a sweep tries next: a grid, at random, or as Optuna proposes; this is the only module that knows Optuna.

A suggestion is a pure function of the seed, the trial's number and what it is told of earlier trials. No searcher keeps a state.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from cluster.studies.space import Dimension, Point, Space
from reactdiff.data.keyed import generator, seed_of

Method = Literal["grid", "random", "optuna"]
Mode = Literal["max", "min"]

TRIES = 100
"""Draws none of which could be tried, after which the points of a space are gone through, or it is taken to be exhausted."""


@dataclass(frozen=True)
class Told:
    """What a searcher is told of a trial.

    Attributes:
        point: that was tried.
        values: of the metrics, in their order; None where it was stopped, failed, or one is undefined.
        errors: items -> mean error at that rung, where it has no values: up to the rung at which it was stopped, or failed.
    """

    point: Point
    values: Sequence[float] | None
    errors: Mapping[int, float] = field(default_factory=dict)


def suggest(
    method: Method,
    space: Space,
    modes: Sequence[Mode],
    seed: int,
    number: int,
    told: Sequence[Told],
    fits: Callable[[Point], bool],
) -> Point | None:
    """The point of a trial.

    Args:
        method: how to search.
        space: what to search.
        modes: whether more or less of each metric is better.
        seed: of the search.
        number: of the trial.
        told: of the trials that it may know, from number 0 on.
        fits: whether a point can be tried: none before it is the same, and there is such an experiment. A grid is not asked.

    Returns:
        The point, None if there is none left: of a space of choices, none at all; of one with ranges, none of many draws.
    """
    if method == "grid":
        points = space.grid()
        return points[number] if number < len(points) else None
    for attempt in range(TRIES):
        if method == "random":
            point = space.draw(lambda key, attempt=attempt: float(generator("sweep", seed, number, attempt, key).random()))  # type: ignore[misc]
        else:
            point = _ask(space, modes, seed_of("sweep", seed, number, attempt) % 2**32, told)
        if fits(point):
            return point
    return next(filter(fits, space.points()), None) if space.finite else None


def _ask(space: Space, modes: Sequence[Mode], seed: int, told: Sequence[Told]) -> Point:
    """What a new study proposes that is told all of this (TPE; Bergstra et al., 2011)."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        directions = [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in modes]
        # One key at a time, so that keys may depend on others.
        study = optuna.create_study(directions=directions, sampler=TPESampler(seed=seed, multivariate=False, constant_liar=False))
        study.add_trials([_frozen(space, modes, one) for one in told])
        trial = study.ask()
        return space.point(lambda key, dimension: _proposed(trial, key, dimension))
    finally:
        optuna.logging.set_verbosity(before)


def _frozen(space: Space, modes: Sequence[Mode], told: Told) -> FrozenTrial:
    """A finished trial as Optuna has it: one without values is pruned, or the worst of all where it has no errors either.

    Of several metrics Optuna ranks no pruned trials: there it has failed, from which Optuna learns nothing.
    """
    distributions = {key: _distribution(space.dimensions[key]) for key in told.point}
    params = {key: _internal(space.dimensions[key], value) for key, value in told.point.items()}
    if told.values is not None:
        return create_trial(values=list(told.values), params=params, distributions=distributions)
    if len(modes) > 1:
        return create_trial(state=TrialState.FAIL, params=params, distributions=distributions)
    sign = -1 if modes[0] == "max" else 1
    if not told.errors:
        return create_trial(values=[sign * math.inf], params=params, distributions=distributions)
    errors = {items: sign * error for items, error in told.errors.items()}
    return create_trial(state=TrialState.PRUNED, params=params, distributions=distributions, intermediate_values=errors)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choice:
        return CategoricalDistribution(range(len(dimension.choice)))  # its values may be lists, which Optuna does not take
    assert dimension.bounds
    (low, high), log = dimension.bounds, dimension.log_range is not None
    return IntDistribution(int(low), int(high), log=log) if dimension.whole else FloatDistribution(low, high, log=log)


def _internal(dimension: Dimension, value: Any) -> Any:
    return dimension.choice.index(value) if dimension.choice else value


def _proposed(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    if dimension.choice:
        return dimension.choice[trial.suggest_categorical(key, range(len(dimension.choice)))]
    assert dimension.bounds
    (low, high), log = dimension.bounds, dimension.log_range is not None
    return trial.suggest_int(key, int(low), int(high), log=log) if dimension.whole else trial.suggest_float(key, low, high, log=log)


def defined(scores: Mapping[str, float | None] | None, metrics: Collection[str]) -> list[float] | None:
    """The scores of these metrics, None if one of them is missing or undefined."""
    found = [(scores or {}).get(metric) for metric in metrics]
    return [value for value in found if value is not None] if all(v is not None and math.isfinite(v) for v in found) else None


def best_of(values: Mapping[int, float | None], mode: Mode) -> int | None:
    """The trial with the best value, the first of equals; one without a finite value is never the best, so there may be none."""
    sign = 1 if mode == "max" else -1
    found = {number: sign * value for number, value in values.items() if value is not None and math.isfinite(value)}
    return max(found, key=lambda number: found[number]) if found else None
