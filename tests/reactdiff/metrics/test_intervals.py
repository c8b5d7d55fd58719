import math

import numpy as np
import pytest

from reactdiff.metrics.frechet import Moments
from reactdiff.metrics.intervals import intervals
from reactdiff.metrics.partial import PER_CLIP, ROUGHNESS, PartialScores, total


def part(**values):
    """A part of as many clips as there are values of each; those that are not given are 0."""
    clips = len(next(iter(values.values())))
    rows = np.stack([np.asarray(values.get(name, np.zeros(clips)), dtype=np.float64) for name in PER_CLIP], axis=1)
    return PartialScores(rows, np.zeros((2, 3, 25)), 0.0, Moments.none(), Moments.none())


def test_the_mean_of_normal_values_is_covered_about_as_often_as_promised():
    covered, rounds = 0, 200
    for seed in range(rounds):
        drawn = np.random.default_rng(seed).normal(5, 2, size=60)
        low, high = intervals([part(FRDist=drawn)], resamples=300, level=0.9)["FRDist"]
        covered += low <= 5 <= high
        assert low < drawn.mean() < high
    assert 0.84 <= covered / rounds <= 0.95


def test_the_width_is_that_of_the_normal_theory():
    drawn = np.random.default_rng(0).normal(size=500)
    low, high = intervals([part(FRCorr=drawn)])["FRCorr"]
    assert high - low == pytest.approx(2 * 1.96 * drawn.std() / math.sqrt(500), rel=0.1)


def test_equal_clips_leave_no_width():
    assert intervals([part(FRDiv=[0.3] * 7)])["FRDiv"] == pytest.approx((0.3, 0.3), rel=1e-15)


def test_twins_have_the_intervals_of_their_metrics_and_two_metrics_have_none():
    found = intervals([part(FRCorr=[1, 2, 4], FRDist=[3, 5, 9], varying=[1, 1, 1])])
    assert found["FRCorr_per_prediction"] == tuple(edge / 2 for edge in found["FRCorr"])
    assert found["FRDist_per_prediction"] == tuple(edge / 2 for edge in found["FRDist"])
    per_clip = {"FRCorr", "FRDist", "FRDiv", "FRVar", "FRSyn", "EnergyScore", "EnergyScore_frame", "FRCorr_of_mean", "FRCorr_no_mouth"}
    assert found.keys() == per_clip | {*ROUGHNESS, "FRCorr_per_prediction", "FRDist_per_prediction", "FRSyn_varying"}


def test_the_varying_synchrony_is_a_ratio_over_the_predictions_that_count():
    """Offset 10 of every prediction that counts: however often each clip is drawn, the ratio is 10."""
    counts = np.array([2, 0, 1, 2])
    assert intervals([part(FRSyn_varying=10 * counts, varying=counts)])["FRSyn_varying"] == (10, 10)
    assert all(math.isnan(edge) for edge in intervals([part(FRSyn_varying=[0, 0], varying=[0, 0])])["FRSyn_varying"])


def test_neither_parts_nor_their_order_matter_but_the_seed_does():
    rng = np.random.default_rng(0)
    one, other = (part(FRCorr=rng.random(20), FRSyn=rng.integers(0, 50, 20), varying=[2] * 20) for _ in range(2))
    whole = intervals([one, other])
    assert intervals([other, one]) == whole == intervals([total([one, other])])
    assert intervals([one, other], seed=1) != whole


def test_a_wider_level_is_wider():
    drawn = part(FRVar=np.random.default_rng(0).random(30))
    (low, high), (lower, higher) = (intervals([drawn], level=level)["FRVar"] for level in (0.5, 0.99))
    assert lower < low < high < higher


@pytest.mark.parametrize(("level", "resamples"), [(0, 10), (1, 10), (0.9, 0)])
def test_what_makes_no_interval_is_refused(level, resamples):
    with pytest.raises(ValueError, match=rf"level is {level} and resamples {resamples}"):
        intervals([part(FRVar=[1.0])], resamples=resamples, level=level)
    with pytest.raises(ValueError, match="no parts to make intervals from"):
        intervals([])
