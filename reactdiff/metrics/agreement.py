"""FRCorr: how well a prediction agrees with the best of the appropriate reactions, attribute by attribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reactdiff.metrics.warping import GROUPS


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
        mean = series.mean(axis=-1, dtype=np.float64)
        centred = series - mean[..., None]
        return cls(series, mean, np.vecdot(centred, centred) / series.shape[-1])


@dataclass(frozen=True)
class Agreement:
    """Predictions against listeners.

    Attributes:
        concordance: (predictions, listeners) mean CCC over the 25 attributes.
        distance: (predictions, listeners) FRDist's sum without any warping: an upper bound, good for ordering.
    """

    concordance: np.ndarray
    distance: np.ndarray


def agreement(predictions: Reaction, listeners: Sequence[Reaction]) -> Agreement:
    """The concordance correlation coefficient of every prediction with every listener (Lin, 1989).

    CCC = 2 r sd_t sd_p / (var_t + var_p + (mu_t - mu_p)^2 + 1e-8) with moments of the population. A constant attribute
    scores 0, even against itself, as in the official code.

    Args:
        predictions: series (predictions, 25, frames).
        listeners: series (25, frames) each.
    """
    frames = predictions.series.shape[-1]
    # r sd_t sd_p is the covariance; as the predictions are centred, the listeners need not be.
    centred = predictions.series - predictions.mean[..., None]
    products = [np.vecdot(centred, listener.series.astype(np.float64)) for listener in listeners]
    covariance = np.stack(products, axis=1) / frames  # (predictions, listeners, 25)
    mean, variance = (np.stack([getattr(listener, name) for listener in listeners]) for name in ("mean", "variance"))
    covariance = np.where(variance > 0, covariance, 0.0)
    spread = predictions.variance[:, None] + variance + (predictions.mean[:, None] - mean) ** 2
    concordance = (2 * covariance / (spread + 1e-8)).mean(axis=-1)
    squared = frames * np.maximum(spread - 2 * covariance, 0)  # squared distance of the unwarped series, by attribute
    distance = sum(np.sqrt(squared[..., group].sum(axis=-1)) / divisor for group, divisor in GROUPS)
    return Agreement(concordance, np.asarray(distance))
