"""FRSyn: at which lag a prediction follows the speaker most closely (time-lagged cross-correlation)."""

from dataclasses import dataclass

import numba
import numpy as np

from reactdiff.metrics.compiled import kernel

LARGEST_LAG = 49
LAGS = np.arange(-LARGEST_LAG, LARGEST_LAG + 1)


@dataclass(frozen=True)
class Offsets:
    """The lag of the highest mean correlation, in frames without sign, of each prediction.

    Attributes:
        official: (predictions,) an undefined correlation counts as the highest, as in the official code: one attribute that
            is constant throughout makes the offset 49.
        varying: (predictions,) over the attributes that vary in every overlap; NaN where there is none.
    """

    official: np.ndarray
    varying: np.ndarray


def offsets(predictions: np.ndarray, speaker: np.ndarray) -> Offsets:
    """The offsets of some predictions from one speaker.

    Args:
        predictions: (predictions, 25, frames) float32.
        speaker: (25, frames) float32; at least 50 frames.
    """
    curves = lagged_correlations(predictions, speaker)
    official = np.abs(LAGS[curves.mean(axis=-1).argmax(axis=-1)])  # argmax takes the first NaN, where there is one
    kept = ~np.isnan(curves).any(axis=-2, keepdims=True)
    count = kept.sum(axis=-1)
    mean = np.where(kept, curves, 0.0).sum(axis=-1) / np.maximum(count, 1)
    varying = np.where(count[:, 0] > 0, np.abs(LAGS[mean.argmax(axis=-1)]), np.nan)
    return Offsets(official, varying)


def lagged_correlations(predictions: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """The Pearson correlation of prediction frame t + lag with speaker frame t, over the frames that both have.

    Args:
        predictions: (predictions, 25, frames) float32.
        speaker: (25, frames) float32.

    Returns:
        (predictions, 99, 25) float64 for the lags -49 to 49; NaN where an attribute is constant in the overlap.
    """
    return np.swapaxes(_correlations(predictions, speaker), -1, -2)


@kernel(error_model="numpy", fastmath={"reassoc", "contract"})
def _correlations(predictions: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """`lagged_correlations` as (predictions, 25, 99). At so few lags plain sums are faster than Fourier transforms."""
    count, width, frames = predictions.shape
    y, y_sum, y_scatter = np.empty((width, frames)), np.empty((width, LAGS.size)), np.empty((width, LAGS.size))
    for attribute in range(width):
        _overlap_moments(speaker[attribute], y[attribute], y_sum[attribute], y_scatter[attribute])
    padded, x_sum, x_scatter = np.zeros(frames + 2 * LARGEST_LAG), np.empty(LAGS.size), np.empty(LAGS.size)
    correlations = np.empty((count, width, LAGS.size))
    for prediction in range(count):
        for attribute in range(width):
            out = correlations[prediction, attribute]
            _overlap_moments(predictions[prediction, attribute], padded[LARGEST_LAG : LARGEST_LAG + frames], x_sum, x_scatter)
            _lagged_products(padded, y[attribute], out)
            for n in range(LAGS.size):
                mirrored = LAGS.size - 1 - n  # what x loses first, y loses last
                overlap = frames - abs(n - LARGEST_LAG)
                covered = out[n] - x_sum[n] * y_sum[attribute, mirrored] / overlap
                out[n] = covered / np.sqrt(x_scatter[n] * y_scatter[attribute, mirrored])
    return correlations


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _lagged_products(padded: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
    """Sums of the products of a series with y, for each lag; three at a time, as they read the same frames."""
    frames = len(y)
    for n in range(0, LAGS.size, 3):
        first, second, third = padded[n : n + frames], padded[n + 1 : n + 1 + frames], padded[n + 2 : n + 2 + frames]
        a = b = c = 0.0
        for t in range(frames):
            a += first[t] * y[t]
            b += second[t] * y[t]
            c += third[t] * y[t]
        out[n], out[n + 1], out[n + 2] = a, b, c


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _overlap_moments(series: np.ndarray, centred: np.ndarray, sums: np.ndarray, scatters: np.ndarray) -> None:
    """Sum and sum of squared deviations without the first `lag` (or, for negative lags, last) frames.

    Args:
        series: (frames,) float32.
        centred: (frames,), filled with the same in float64 minus its mean, against cancellation.
        sums: (99,), filled with sums of what is centred.
        scatters: (99,), filled with squared deviations; NaN where the overlap is constant.
    """
    frames = len(series)
    mean = 0.0
    for t in range(frames):
        mean += np.float64(series[t])
    mean /= frames
    whole = squares = 0.0
    for t in range(frames):
        centred[t] = series[t] - mean
        whole += centred[t]
        squares += centred[t] * centred[t]
    first, last = 1, frames - 1  # the first and the last frame that differ from the one before
    while first < frames and series[first] == series[first - 1]:
        first += 1
    while last > 0 and series[last] == series[last - 1]:
        last -= 1
    for direction in (1, -1):
        total, square = whole, squares
        for lag in range(LARGEST_LAG + 1):
            n = LARGEST_LAG + direction * lag
            constant = last <= lag if direction == 1 else first >= frames - lag
            sums[n] = total
            scatters[n] = np.nan if constant else square - total * total / (frames - lag)
            lost = centred[lag] if direction == 1 else centred[frames - 1 - lag]
            total -= lost
            square -= lost * lost
