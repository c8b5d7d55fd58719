"""FRCorr: how well a prediction agrees with the best of the appropriate reactions, attribute by attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np


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
        series = np.ascontiguousarray(np.swapaxes(attributes, -1, -2), dtype=np.float32)
        mean = _sums(series.reshape(-1, series.shape[-1])).reshape(series.shape[:-1]) / series.shape[-1]
        return cls(series, mean, _covariance(series, mean, series))


def concordance(predictions: Reaction, listeners: Sequence[Reaction]) -> np.ndarray:
    """The concordance correlation coefficient of every prediction with every listener (Lin, 1989).

    CCC = 2 r sd_t sd_p / (var_t + var_p + (mu_t - mu_p)^2 + 1e-8) with moments of the population. A constant attribute
    scores 0, even against itself, as in the official code.

    Args:
        predictions: series (predictions, 25, frames).
        listeners: series (25, frames) each.

    Returns:
        (predictions, listeners), the mean over the 25 attributes.
    """
    # r sd_t sd_p is the covariance; clipping r to [-1, 1], as the official code does, would change rounding only.
    each = [_covariance(predictions.series, predictions.mean, listener.series) for listener in listeners]
    covariance = np.stack(each, axis=1)  # (predictions, listeners, 25)
    mean, variance = (np.stack([getattr(listener, name) for listener in listeners]) for name in ("mean", "variance"))
    covariance = np.where(variance > 0, covariance, 0.0)
    spread = predictions.variance[:, None] + variance + (predictions.mean[:, None] - mean) ** 2
    return (2 * covariance / (spread + 1e-8)).mean(axis=-1)


def _covariance(x: np.ndarray, x_mean: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Population covariance over time of x (..., 25, frames) with y, of the same shape or (25, frames)."""
    frames = x.shape[-1]
    return _centred_products(x.reshape(-1, frames), x_mean.ravel(), y.reshape(-1, frames)).reshape(x_mean.shape) / frames


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sums(x: np.ndarray) -> np.ndarray:
    """Sums over time in float64, row by row: exact for a constant row, whose variance is then exactly 0."""
    sums = np.zeros(len(x))
    for row in range(len(x)):
        total = 0.0
        for t in range(x.shape[1]):
            total += np.float64(x[row, t])
        sums[row] = total
    return sums


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _centred_products(x: np.ndarray, x_mean: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums over time of (x - mean) y in float64, row by row; y's rows are repeated. As x is centred, y need not be."""
    sums = np.zeros(len(x))
    for row in range(len(x)):
        xs, ys, mean = x[row], y[row % len(y)], x_mean[row]
        total = 0.0
        for t in range(x.shape[1]):
            total += (np.float64(xs[t]) - mean) * np.float64(ys[t])
        sums[row] = total
    return sums
