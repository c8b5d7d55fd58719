import math

import numpy as np
import pytest

from reactdiff.metrics.frechet import Moments, frechet
from reactdiff.metrics.official import merge, score, score_part
from tests.reactdiff.metrics.test_official import small


def normal(mean, covariance, frames=400, seed=0):
    """Series (1, 25, frames) float32 with exactly this mean and unbiased covariance."""
    drawn = np.random.default_rng(seed).normal(size=(frames, 25))
    drawn -= drawn.mean(axis=0)
    drawn = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T @ np.linalg.cholesky(covariance).T + mean
    return np.ascontiguousarray(drawn.T[None], dtype=np.float32)


def test_it_is_the_closed_form_for_axes_that_coincide():
    """Covariances that commute: |m1 - m2|^2 + sum (sd1 - sd2)^2."""
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(25, 25)))[0]
    means, deviations = rng.normal(size=(2, 25)), rng.uniform(0.1, 2, size=(2, 25))
    one, other = (
        Moments.of(normal(mean, (axes * sd**2) @ axes.T, seed=seed)) for seed, (mean, sd) in enumerate(zip(means, deviations, strict=True))
    )
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet(one, other) == pytest.approx(expected, rel=1e-5)
    assert frechet(other, one) == pytest.approx(expected, rel=1e-5)


def test_it_is_the_closed_form_for_any_axes():
    """tr (C1 C2)^1/2 is the sum of the roots of the eigenvalues of C1 C2, which is not symmetric."""
    rng = np.random.default_rng(2)
    factors = rng.normal(size=(2, 25, 40)) / 5
    one, other = (factor @ factor.T for factor in factors)
    expected = np.trace(one) + np.trace(other) - 2 * np.sqrt(np.linalg.eigvals(one @ other).real).sum()
    found = frechet(Moments.of(normal(0, one)), Moments.of(normal(0, other, seed=1)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_equal_sets_are_at_distance_zero_even_with_constant_and_repeated_attributes():
    series = np.random.default_rng(0).random((3, 25, 60), dtype=np.float32)
    series[:, 4] = 0.7
    series[:, 5] = series[:, 6]
    assert frechet(Moments.of(series), Moments.of(series[::-1])) == pytest.approx(0, abs=1e-7)


def test_moments_of_parts_are_those_of_the_whole():
    series = 100 + np.random.default_rng(0).random((4, 25, 60), dtype=np.float32)
    merged = Moments.none() + Moments.of(series[:1]) + Moments.of(series[1:]) + Moments.none()
    frames = series.swapaxes(1, 2).reshape(-1, 25).astype(np.float64)
    assert merged.frames == 240
    np.testing.assert_allclose(merged.mean, frames.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.scatter / 239, np.cov(frames.T), rtol=1e-9, atol=1e-12)
    assert (Moments.none() + Moments.none()).frames == 0


def test_the_real_reactions_as_predictions_are_at_no_distance_and_shifted_ones_at_that_of_the_shift():
    arrays = small()
    arrays["pred"] = np.repeat(arrays["target"][:, None], 3, axis=1)
    assert score(**arrays).extra["FrechetAttributes"] == pytest.approx(0, abs=0.01)  # 720 and 240 frames: other unbiased covariances
    arrays["pred"] = arrays["pred"] + np.float32(2)
    assert score(**arrays).extra["FrechetAttributes"] == pytest.approx(100, abs=0.01)


def test_it_is_undefined_unless_the_real_reactions_of_all_clips_are_known():
    arrays = small(clips=2)
    near = [np.array([0]), np.array([1])]
    pieces = [(arrays["pred"][i : i + 1], arrays["target"], arrays["speaker"][i : i + 1], near[i : i + 1]) for i in (0, 1)]
    known, unknown = score_part(*pieces[0], own=[0]), score_part(*pieces[1])
    assert math.isfinite(merge([known]).extra["FrechetAttributes"])
    assert math.isnan(merge([unknown]).extra["FrechetAttributes"])
    assert math.isnan(merge([known, unknown]).extra["FrechetAttributes"])
