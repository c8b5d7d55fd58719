"""FRSyn: at which lag a prediction follows the speaker most closely (time-lagged cross-correlation)."""

from dataclasses import dataclass

import numpy as np

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
    frames = speaker.shape[-1]
    x, y = (np.subtract(series, series.mean(axis=-1, keepdims=True, dtype=np.float64)) for series in (predictions, speaker))
    size = 1 << (frames + LARGEST_LAG - 1).bit_length()  # long enough for no lag to wrap around
    circular = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(y, size).conj(), size)
    products = circular[..., LAGS]
    overlap = frames - np.abs(LAGS)
    x_sum, x_scatter = _overlap_moments(predictions, x)
    y_sum, y_scatter = (moment[..., ::-1] for moment in _overlap_moments(speaker, y))  # what x loses first, y loses last
    correlations = (products - x_sum * y_sum / overlap) / np.sqrt(x_scatter * y_scatter)
    return np.swapaxes(correlations, -1, -2)


def _overlap_moments(series: np.ndarray, centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squared deviations without the first `lag` (or, for negative lags, last) frames.

    Args:
        series: (..., frames) float32; a constant overlap has NaN squared deviations.
        centred: the same in float64 minus its mean, against cancellation.

    Returns:
        Two arrays (..., 99).
    """
    frames = series.shape[-1]
    total = _without_ends(centred)
    scatter = _without_ends(centred**2) - total**2 / (frames - np.abs(LAGS))
    changes = series[..., 1:] != series[..., :-1]  # index t: frame t + 1 differs from frame t
    never = ~changes.any(axis=-1)
    first = np.where(never, frames, changes.argmax(axis=-1) + 1)[..., None]
    last = np.where(never, 0, frames - 1 - changes[..., ::-1].argmax(axis=-1))[..., None]
    constant = np.where(LAGS < 0, first >= frames + LAGS, last <= LAGS)
    return total, np.where(constant, np.nan, scatter)


def _without_ends(values: np.ndarray) -> np.ndarray:
    total = values.sum(axis=-1, keepdims=True)
    first = np.cumsum(values[..., :LARGEST_LAG], axis=-1)
    last = np.cumsum(values[..., : -LARGEST_LAG - 1 : -1], axis=-1)
    return np.concatenate([total - last[..., ::-1], total, total - first], axis=-1)
