import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reactdiff.metrics.dtw import laid_out, nearest, squared_cost


def walks(*shape, seed=0):
    return np.cumsum(np.random.default_rng(seed).normal(size=shape), axis=-1).astype(np.float32)


def cost_below(limit, x, y):
    return squared_cost(laid_out(x), laid_out(y[:, ::-1]), x.shape[1], limit)


def nearest_of(prediction, listeners):
    return nearest(laid_out(prediction[:, ::-1]), [laid_out(one) for one in listeners], prediction.shape[1])


def plain_cost(x, y):
    """By recursion over all cells in order, in float64."""
    cost = ((x[:, :, None].astype(np.float64) - y[:, None, :]) ** 2).sum(axis=0)
    table = np.full((x.shape[1] + 1, y.shape[1] + 1), math.inf)
    table[0, 0] = 0
    for i, j in np.ndindex(cost.shape):
        table[i + 1, j + 1] = cost[i, j] + min(table[i, j], table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@settings(max_examples=60)
@given(features=st.sampled_from([2, 8, 15]), frames=st.integers(1, 60), seed=st.integers(0, 1000), part=st.floats(0.05, 3))
def test_the_cost_is_exact_up_to_the_limit_and_infinite_above(features, frames, seed, part):
    x, y = walks(2, features, frames, seed=seed)
    cost = plain_cost(x, y)
    found = cost_below(part * cost, x, y)
    if part <= 0.999:
        assert found == math.inf
    elif part >= 1.001:
        assert found == pytest.approx(cost, rel=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), slower=st.floats(0.5, 2), share=st.floats(1.001, 1.2))
def test_a_path_far_from_the_diagonal_is_exact_beside_all_that_is_given_up(seed, slower, share):
    """The second series runs ahead of the first or lags behind: whole vectors of cells are given up on one side of the path."""
    frames = 150
    walk = walks(2, frames, seed=seed)
    time = np.linspace(0, 1, frames) ** slower * (frames - 1)
    warped = np.stack([np.interp(time, np.arange(frames), row) for row in walk]).astype(np.float32) + walks(2, frames, seed=seed + 1) / 50
    cost = plain_cost(walk, warped)
    assert cost_below(share * cost, walk, warped) == pytest.approx(cost, rel=1e-6)
    assert cost_below(math.inf, walk, warped) == cost_below(share * cost, walk, warped)


def test_clips_longer_than_the_challenges_have_the_same_definition():
    x, y = walks(2, 2, 770)
    assert cost_below(math.inf, x, y) == pytest.approx(plain_cost(x, y), rel=1e-6)


def test_a_series_costs_nothing_against_itself_stretched():
    x = walks(3, 20)
    slow = np.repeat(x, 2, axis=1)[:, :20]
    fast = np.concatenate([x[:, :10], np.repeat(x[:, 9:10], 10, axis=1)], axis=1)
    assert cost_below(math.inf, slow, fast) == 0


def test_the_nearest_listener_does_not_depend_on_the_order():
    prediction, *listeners = walks(5, 25, 30)
    found = {nearest_of(prediction, order) for order in itertools.permutations(listeners)}
    groups = ((slice(0, 15), 15), (slice(15, 17), 1), (slice(17, 25), 8))
    expected = min(sum(math.sqrt(plain_cost(one[group], prediction[group])) / divisor for group, divisor in groups) for one in listeners)
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-6)
