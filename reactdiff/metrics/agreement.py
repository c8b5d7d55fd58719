"""FRCorr: how well a prediction agrees with the best of the appropriate reactions, attribute by attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from reactdiff.metrics.compiled import kernel


@dataclass(frozen=True)
class Reaction:
    """One or several attribute series, laid out for comparison, with their moments.

    Attributes:
        series: (..., 25, frames) float32, C-contiguous.
        mean: (..., 25) float64, over time.
        variance: (..., 25) float64, over time, of the population; exactly 0 for a constant attribute.
    """

    series: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, attributes: np.ndarray) -> "Reaction":
        """From attributes (..., frames, 25)."""
        *lead, frames, width = attributes.shape
        series, mean, variance = _laid_out(np.ascontiguousarray(attributes, dtype=np.float32).reshape(-1, frames, width))
        return cls(series.reshape(*lead, width, frames), mean.reshape(*lead, width), variance.reshape(*lead, width))


def concordance(predictions: Reaction, listeners: Sequence[Reaction]) -> np.ndarray:
    """The concordance correlation coefficient of every prediction with every listener (Lin, 1989).

    CCC = 2 r sd_t sd_p / (var_t + var_p + (mu_t - mu_p)^2 + 1e-8) with moments of the population. A constant attribute
    scores 0, even against itself, as in the official code.

    Args:
        predictions: series (predictions, 25, frames).
        listeners: series (25, frames) each.

    Returns:
        (predictions, listeners, 25): FRCorr takes the mean over the attributes.
    """
    of = (predictions.series, predictions.mean, predictions.variance)
    return np.stack([_concordance(*of, other.series, other.mean, other.variance) for other in listeners], axis=1)


@kernel(error_model="numpy")
def _laid_out(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Series, mean and variance of x (clips, frames, width), clip by clip while it is in the cache, each read in order."""
    clips, frames, width = x.shape
    series, mean, variance = np.empty((clips, width, frames), np.float32), np.empty((clips, width)), np.empty((clips, width))
    for clip in range(clips):
        for t in range(frames):
            for attribute in range(width):
                series[clip, attribute, t] = x[clip, t, attribute]
        for attribute in range(width):
            row = series[clip, attribute]
            mean[clip, attribute] = _sum(row) / frames
            variance[clip, attribute] = _centred_product(row, mean[clip, attribute], row) / frames
    return series, mean, variance


@kernel(error_model="numpy")
def _concordance(
    x: np.ndarray, x_mean: np.ndarray, x_variance: np.ndarray, y: np.ndarray, y_mean: np.ndarray, y_variance: np.ndarray
) -> np.ndarray:
    """Of each x (clips, width, frames) with the one y (width, frames): (clips, width)."""
    clips, width, frames = x.shape
    found = np.zeros((clips, width))
    for clip in range(clips):
        for attribute in range(width):
            if y_variance[attribute] > 0:
                # r sd_t sd_p is the covariance; clipping r to [-1, 1], as the official code does, would change rounding only.
                covariance = _centred_product(x[clip, attribute], x_mean[clip, attribute], y[attribute]) / frames
                spread = x_variance[clip, attribute] + y_variance[attribute] + (x_mean[clip, attribute] - y_mean[attribute]) ** 2
                found[clip, attribute] = 2 * covariance / (spread + 1e-8)
    return found


@numba.njit(nogil=True, fastmath={"reassoc"})
def _sum(x: np.ndarray) -> float:
    """Over time in float64: exact for a constant series, whose variance is then exactly 0."""
    total = 0.0
    for t in range(len(x)):
        total += np.float64(x[t])
    return total


@numba.njit(nogil=True, fastmath={"reassoc", "contract"})
def _centred_product(x: np.ndarray, mean: float, y: np.ndarray) -> float:
    """The sum over time of (x - mean) y in float64. As x is centred, y need not be."""
    total = 0.0
    for t in range(len(x)):
        total += (np.float64(x[t]) - mean) * np.float64(y[t])
    return total
