"""The Frechet distance of two sets of attribute vectors, from sums that add up over clips.

FRRea compares rendered faces by the features of an image network (FID; Heusel et al., 2017). This is the same distance between the
25 attributes themselves, which needs no renderer; its values are not comparable with FRRea.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from reactdiff.clip import ATTRIBUTES
from reactdiff.metrics.compiled import kernel


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of some frames' attribute vectors; two of them add up to those of all their frames.

    Attributes:
        frames: how many.
        mean: (25,) float64.
        scatter: (25, 25) float64, sum over the frames of the outer square of the deviation from the mean.
    """

    frames: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def none(cls) -> Self:
        """Of no frames."""
        return cls(0, np.zeros(len(ATTRIBUTES)), np.zeros((len(ATTRIBUTES), len(ATTRIBUTES))))

    @classmethod
    def of(cls, series: np.ndarray) -> Self:
        """Of the frames of series (..., 25, frames) float32, C-contiguous."""
        series = series.reshape(-1, *series.shape[-2:])
        mean = series.mean(axis=(0, 2), dtype=np.float64)
        return cls(series.shape[0] * series.shape[2], mean, _scatter(series, mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets' frames together (Chan, Golub and LeVeque, 1983)."""
        if (frames := self.frames + other.frames) == 0:
            return self
        shift, share = other.mean - self.mean, other.frames / frames
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.frames * share)
        return Moments(frames, self.mean + shift * share, scatter)


def frechet(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of two normal distributions with these means and unbiased covariances (Dowson and Landau, 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), squared as FID is. All roots are of symmetric matrices, by their
    eigenvalues, so that constant attributes do no harm. NaN where a set has fewer than two frames.
    """
    if min(one.frames, other.frames) < 2:
        return float("nan")
    first, second = (moments.scatter / (moments.frames - 1) for moments in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ second @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = np.sum((one.mean - other.mean) ** 2) + np.trace(first) + np.trace(second) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave a little less than nothing


@kernel(error_model="numpy", fastmath={"reassoc", "contract"})
def _scatter(series: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Summed in one order, whatever the number of threads, which a BLAS does not promise."""
    width, frames = series.shape[1:]
    scatter = np.zeros((width, width))
    centred = np.empty((width, frames))
    for one in series:
        for a in range(width):
            for t in range(frames):
                centred[a, t] = one[a, t] - mean[a]
            for b in range(a + 1):
                xs, ys = centred[a], centred[b]
                total = 0.0
                for t in range(frames):
                    total += xs[t] * ys[t]
                scatter[a, b] += total
    for a in range(width):
        for b in range(a):
            scatter[b, a] = scatter[a, b]
    return scatter
