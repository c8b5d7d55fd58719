"""Averages of any length, made afterwards: against averages that were followed step by step."""

import numpy as np
import pytest

from reactdiff.averages import LENGTHS, LONGEST, Profile, average_kind, decay, exponent, mixture

STEPS = 600


def followed(path: np.ndarray, length: float, until: int) -> np.ndarray:
    """The average after so many steps, each taken in as training does."""
    average = np.full(path.shape[1], 9.0)
    for step, weights in enumerate(path[:until], 1):
        kept = decay(length, step)
        average = kept * average + (1 - kept) * weights
    return average


def walk() -> np.ndarray:
    """Weights that drift ever more slowly, under noise."""
    random = np.random.default_rng(0)
    return np.cumsum(random.normal(size=(STEPS, 50)) / np.sqrt(np.arange(1, STEPS + 1))[:, None], axis=0)


def test_a_length_is_the_deviation_in_time_of_an_average_s_profile() -> None:
    for length in (0.01, *LENGTHS, 0.2, LONGEST):
        profile = followed(np.eye(STEPS), length, STEPS)
        at = np.arange(1, STEPS + 1) / STEPS
        middle = (profile @ at) / profile.sum()
        assert np.sqrt(profile @ (at - middle) ** 2 / profile.sum()) == pytest.approx(length, rel=0.02), length
    assert [exponent(length) for length in LENGTHS] == pytest.approx([16.97, 6.94], abs=5e-3), "as the paper has them"
    assert [average_kind(length) for length in LENGTHS] == ["average-0.05", "average-0.10"]


def test_the_first_step_leaves_nothing_of_what_was_there_before() -> None:
    path = walk()
    for length in LENGTHS:
        assert np.array_equal(followed(path, length, 1), path[0])


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_a_mixture_of_two_lengths_at_twelve_moments_is_the_average_of_another_length(length: float) -> None:
    path = walk()
    there = [Profile(steps, kept) for steps in range(50, STEPS + 1, 50) for kept in LENGTHS]
    found = mixture(there, Profile(STEPS, length))
    mixed = sum(weight * followed(path, one.length, one.steps) for weight, one in zip(found.weights, there, strict=True))
    wanted = followed(path, length, STEPS)
    others = min(float(np.linalg.norm(followed(path, kept, STEPS) - wanted)) for kept in LENGTHS)
    assert np.linalg.norm(mixed - wanted) < 0.15 * others and found.misfit < 0.07
    assert sum(found.weights) == pytest.approx(1.0)


def test_an_average_that_was_kept_is_taken_as_it_is_and_one_that_is_far_away_says_so() -> None:
    there = [Profile(steps, kept) for steps in (100, 300, STEPS) for kept in LENGTHS]
    for place, kept in enumerate(LENGTHS, 4):
        found = mixture(there, Profile(STEPS, kept))
        assert found.misfit < 1e-6 and found.weights == pytest.approx([float(place == one) for one in range(6)], abs=1e-9)
    assert mixture(there[-2:], Profile(STEPS, 0.01)).misfit > 0.4
    for length in (0.0, -0.1, 0.29):
        with pytest.raises(ValueError, match=rf"relative length {length} cannot be made: choose one above 0, at most 0.28"):
            exponent(length)
