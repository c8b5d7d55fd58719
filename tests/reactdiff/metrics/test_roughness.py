"""Steps from frame to frame: what they see that other metrics do not."""

import numpy as np
import pytest

from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.metrics.agreement import Reaction
from reactdiff.metrics.official import score
from reactdiff.metrics.partial import ROUGHNESS
from reactdiff.metrics.roughness import SEAMS, at_seams, frame_steps


def smooth(*shape):
    """Reactions that wander slowly."""
    return np.cumsum(0.01 * np.random.default_rng(0).standard_normal(shape), axis=-2).astype(np.float32)


def rough(pred, target):
    scores = score(pred, target, target, np.eye(len(target)))
    assert scores.intervals.keys() >= set(ROUGHNESS)
    return [scores.extra[name] for name in ROUGHNESS]


def test_a_step_is_the_mean_over_action_units_affect_and_expressions_which_count_alike():
    series = smooth(3, 60, 25)
    steps = np.abs(np.diff(series.astype(np.float64), axis=1)).mean(axis=0)
    expected = np.mean([steps[:, group].mean(axis=1) for group in (AU, VALENCE_AROUSAL, EXPRESSION)], axis=0)
    np.testing.assert_allclose(frame_steps(Reaction.of(series)), expected, rtol=1e-5)


def test_real_reactions_have_roughness_1_and_noise_more():
    target = smooth(5, 200, 25)
    assert rough(target[:, None], target) == pytest.approx([1] * 5, rel=0.1)
    noisy = target[:, None] + 0.1 * np.random.default_rng(1).standard_normal((5, 3, 200, 25)).astype(np.float32)
    assert min(rough(noisy, target)) > 5


@pytest.mark.parametrize("group", [AU, VALENCE_AROUSAL, EXPRESSION])
def test_roughness_is_one_ratio_of_mean_steps_in_which_each_group_weighs_as_it_really_moves(group):
    def step(series, where):
        steps = np.abs(np.diff(series.astype(np.float64), axis=-2))[..., where, :]
        return np.mean([steps[..., one].mean() for one in (AU, VALENCE_AROUSAL, EXPRESSION)])

    target = smooth(5, 200, 25)
    target[..., VALENCE_AROUSAL] *= 3
    pred = target[:, None].repeat(2, axis=1)
    pred[..., group] += 0.1 * np.random.default_rng(1).standard_normal(pred[..., group].shape).astype(np.float32)
    everywhere = np.arange(1, 200)
    inside = everywhere % SEAMS[0] != 0  # and so not at the ends of longer pieces
    assert rough(pred, target)[0] == pytest.approx(step(pred, inside) / step(target, everywhere > 0), rel=1e-5)


@pytest.mark.parametrize("length", SEAMS)
def test_jumps_at_the_ends_of_pieces_are_seen_there_and_not_inside(length):
    target = smooth(5, 200, 25)
    jumping = target[:, None] + np.where(np.arange(200) // length % 2, 0.1, 0.0).astype(np.float32)[:, None]
    inside, *ends = rough(jumping, target)
    assert inside == pytest.approx(1, rel=0.1) and ends[SEAMS.index(length)] > 5


def test_a_clip_without_such_a_place_has_no_value_there():
    assert np.isnan(at_seams(np.ones(49))).tolist() == [False] * 4 + [True]
