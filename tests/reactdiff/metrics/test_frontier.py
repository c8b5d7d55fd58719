"""The share of the frontier: what it divides by, and how sure it is."""

import math

import numpy as np
import pytest

from reactdiff.metrics.frontier import frontier_share, share_interval

FRONTIER = [(3.0, 0.2), (3.5, 0.1), (4.0, 0.0)]


@pytest.mark.parametrize(
    ("agreement", "diversity", "share"), [(3.0, 0.2, 1), (1.75, 0.1, 0.5), (3.25, 0.15, 1), (1.5, 0.4, 0.5), (2.0, 0.0, 0.5)]
)
def test_it_is_the_way_to_the_frontier_at_the_same_diversity(agreement, diversity, share):
    assert frontier_share(agreement, diversity, FRONTIER[::-1]) == pytest.approx(share)


def test_without_a_frontier_above_nothing_there_is_no_share():
    assert math.isnan(frontier_share(1, 0.1, [(0, 0.1), (0, 0.2)]))


def test_clips_that_are_hard_for_all_alike_leave_no_width():
    rng = np.random.default_rng(0)
    oracle = np.column_stack([rng.random(30) + 1, np.full(30, 0.1)])
    assert share_interval(oracle * [0.5, 1], [oracle]) == pytest.approx((0.5, 0.5))
    low, high = share_interval(np.column_stack([rng.random(30) + 1, np.full(30, 0.1)]), [oracle])
    assert low < 1 < high
