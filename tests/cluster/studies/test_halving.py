"""Decisions of halving: the same in every order in which trials reach their rungs, at a stated rate of errors."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.studies.halving import WORST, Choice, Halving, Standing, choose, sign_flip, variance_ratio
from cluster.studies.ledger import TrialRecord

RUNGS = (10, 20, 40)
ITEMS = 10


def halving(**keys: Any) -> Halving:
    return Halving.model_validate({"rungs": RUNGS} | keys)


class Trial:
    """A trial that would measure these errors, were it let to; it may fail on its way."""

    def __init__(self, number: int, chance: np.random.Generator):
        clips, quality = np.arange(ITEMS) / ITEMS, chance.choice([0.0, 0.02, 0.3])
        self.number, self.bracket = number, str(chance.integers(2))
        self.errors = [1 + clips + quality / (1 + rung) + 0.01 * chance.random(ITEMS) for rung in range(len(RUNGS))]
        self.fails_before = int(chance.integers(len(RUNGS))) if chance.random() < 0.15 else None
        self.at = 0


def sweep(trials: list[Trial], order: random.Random, concurrent: int) -> dict[tuple[int, int], Choice]:
    """Every decision of a sweep in which trials get on in a random order, so many at a time, and are stopped late or at once."""
    standings = {trial.number: Standing(trial.bracket) for trial in trials}
    waiting, running, choices = list(trials), list[Trial](), dict[tuple[int, int], Choice]()
    for trial in trials:
        trial.at = 0
    while waiting or running:
        while waiting and len(running) < concurrent:
            running.append(waiting.pop(0))
        trial = order.choice(running)
        one = standings[trial.number]
        if trial.at == trial.fails_before:
            one.end = "FAILED"
        elif trial.at == len(RUNGS):
            one.end = "DONE"
        else:
            one.errors[trial.at] = trial.errors[trial.at]
            trial.at += 1
        if order.random() < 0.7:  # a driver that is away for a while decides later
            choices |= {(made.trial, made.rung): made for made in choose(halving(), standings)}
        if one.end or (one.stopped_at is not None and order.random() < 0.5):
            running.remove(trial)
    choices |= {(made.trial, made.rung): made for made in choose(halving(), standings)}
    assert all(one.settled(len(RUNGS)) for one in standings.values())
    return choices


@pytest.mark.parametrize("seed", range(20))
def test_every_order_of_arrival_gives_the_same_decisions(seed: int) -> None:
    trials = [Trial(number, np.random.default_rng([seed, number])) for number in range(8)]
    one_by_one = sweep(trials, random.Random(0), concurrent=1)
    assert any(not choice.goes_on for choice in one_by_one.values()), "something is stopped"
    for again in range(12):
        order = random.Random(f"{seed} {again}")
        other = sweep(trials, order, order.randint(1, 8))
        stopped = {trial for (trial, _), choice in one_by_one.items() if not choice.goes_on}
        assert {key: other[key] for key in one_by_one} == one_by_one
        assert other == one_by_one, f"nothing beyond the end of {stopped} is decided"


def test_what_a_trial_measures_after_a_rung_at_which_it_will_be_stopped_counts_for_nobody() -> None:
    base = np.linspace(1, 2, ITEMS)
    bad = Standing(errors={0: base + 0.5, 1: base - 0.9, 2: base - 0.9})  # better later, but that is too late
    trials = {0: Standing(), 1: bad, 2: Standing(errors={0: base, 1: base})}
    assert choose(halving(), trials) == [], "the first trial is not there yet, so nothing is ripe"
    trials[0].errors = {0: base + 0.01}
    made = choose(halving(), trials)
    assert [(choice.trial, choice.rung, choice.goes_on) for choice in made] == [(0, 0, True), (1, 0, False), (2, 0, True)]
    trials[0].errors[1] = base + 0.01
    last = choose(halving(), trials)[-1]
    assert (last.trial, last.rung, last.goes_on, last.against) == (2, 1, True, 0)


def test_a_trial_that_failed_for_good_is_not_waited_for_and_one_that_did_not_is() -> None:
    base = np.linspace(1, 2, ITEMS)
    trials = {0: Standing(), 1: Standing(errors={0: base})}
    assert choose(halving(), trials) == []
    trials[0].end = "FAILED"
    assert choose(halving(), trials) == [Choice(1, 0, True)]


def test_a_rung_that_a_trial_passed_unmeasured_is_skipped_once_it_ends() -> None:
    """As where the number of clips is changed while it trains: what it measured before is of other clips."""
    base = np.linspace(1, 2, ITEMS)
    trials = {0: Standing(errors={1: base, 2: base}), 1: Standing(errors={0: base + 1, 1: base + 1})}
    assert choose(halving(), trials) == [], "nobody can know yet that it will not be measured"
    trials[0].end = "DONE"
    assert [(made.trial, made.rung, made.goes_on) for made in choose(halving(), trials)] == [
        *((0, 1, True), (0, 2, True)),
        *((1, 0, True), (1, 1, False)),
    ]
    assert trials[0].settled(len(RUNGS)) and trials[1].settled(len(RUNGS))


def test_trials_of_another_bracket_are_neither_waited_for_nor_compared_with() -> None:
    base = np.linspace(1, 2, ITEMS)
    trials = {0: Standing("a"), 1: Standing("b", {0: base + 1}), 2: Standing("b", {0: base})}
    assert [(made.trial, made.against) for made in choose(halving(), trials)] == [(1, None), (2, 1)]


def test_a_decision_waits_until_all_lower_numbers_are_there() -> None:
    assert choose(halving(), {1: Standing(errors={0: np.ones(ITEMS)})}) == []


@pytest.mark.parametrize(("items", "times"), [(8, 2000), (13, 400)])
def test_trials_that_are_equally_good_are_stopped_as_rarely_as_is_said(items: int, times: int) -> None:
    chance, level = np.random.default_rng(3), 0.05
    clips = chance.random((times, items))
    stopped = np.mean([sign_flip(noise, level) <= level for noise in chance.normal(size=clips.shape) * clips])
    assert abs(stopped - 0.05) <= 3 * (0.05 * 0.95 / times) ** 0.5


def test_the_two_directions_of_a_dyad_are_one_sample() -> None:
    """They share their clip: taken for two, they would stop trials that are equally good far more often than is said."""
    chance, clips, times = np.random.default_rng(4), 12, 400

    def stopped(of_one: Callable[[np.ndarray], np.ndarray]) -> float:
        records = (TrialRecord(1, {}, "run", "0", {0: {"errors": np.tile(chance.normal(size=clips), 2)[:, None]}}) for _ in range(times))
        return float(np.mean([sign_flip(of_one(record.of_clips(0)), 0.05) <= 0.05 for record in records]))

    assert abs(stopped(lambda one: one) - 0.05) <= 3 * (0.05 * 0.95 / times) ** 0.5
    assert stopped(lambda one: np.tile(one, 2)) > 0.09


def test_the_exact_p_value_counts_every_choice_of_signs() -> None:
    differences = np.array([0.3, 0.1, -0.2, 0.4])
    signs = itertools.product([1, -1], repeat=4)
    assert sign_flip(differences, 0.05) == sum(np.dot(sign, differences) >= 0.6 - 1e-9 for sign in signs) / 16


def test_a_worse_trial_is_stopped_although_clips_differ_by_far_more_than_trials_do() -> None:
    clips = np.random.default_rng(0).normal(5, 2, 32)
    better, worse = clips, clips + 0.01 + 0.001 * np.random.default_rng(1).normal(size=32)
    first, second = choose(halving(rungs=(10,)), {0: Standing(errors={0: better}), 1: Standing(errors={0: worse})})
    assert first.goes_on and not second.goes_on
    assert second.smaller is not None and second.smaller > 1e4
    assert second.smaller == variance_ratio(worse, better)


def test_a_trial_with_an_error_that_is_not_finite_is_stopped_by_one_without() -> None:
    base = np.linspace(1, 2, ITEMS)
    broken = np.where(np.arange(ITEMS) == 3, WORST, base - 0.5)
    trials = {number: Standing(errors={0: each}) for number, each in enumerate((broken, broken, base, broken))}
    made = choose(halving(), trials)
    assert [(one.trial, one.goes_on, one.against) for one in made] == [(0, True, None), (1, True, 0), (2, True, 0), (3, False, 2)]


def test_the_error_rate_is_shared_by_rungs_and_rivals_and_says_how_many_clips_it_takes() -> None:
    rule = halving(error=0.06)
    assert rule.level(4) == pytest.approx(0.06 / 12)
    needed = rule.clips_needed(5)
    assert 2.0**-needed <= rule.level(4) < 2.0 ** -(needed - 1)
    wins = np.ones(needed)
    assert sign_flip(wins, rule.level(4)) <= rule.level(4) < sign_flip(wins[1:], rule.level(4))


@pytest.mark.parametrize("rungs", [[], [0, 5], [5, 5], [9, 3]])
def test_rungs_that_do_not_rise_are_refused(rungs: list[int]) -> None:
    with pytest.raises(ValidationError):
        halving(rungs=rungs)
