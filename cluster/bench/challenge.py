"""The official metrics as the challenges' code computes them, written plainly: the rival of `bench/metrics.py`.

What they have compiled is compiled here: the table of a warping path, whole and in float64, by numba as tslearn's is, and PyTorch's
distances and variances. What they do in Python is done in Python: NumPy calls for one attribute of one pair, or of one lag. What each
metric means, and what is odd about it: docs/metrics.md.
"""

import math
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch

from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.metrics.synchrony import LARGEST_LAG

Neighbours = Sequence[np.ndarray]


def _frcorr(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean over clips of the sum over predictions of the best concordance."""
    clips = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for predictions, others in zip(pred, near, strict=True):
            clips.append(sum(max(_concordance(target[other], one) for other in others) for one in predictions))
    return float(np.mean(clips))


def _frdist(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean over clips of the sum over predictions of the least distance, each warped by three paths."""
    clips = []
    for predictions, others in zip(pred, near, strict=True):
        clips.append(sum(min(_distance(target[other], one) for other in others) for one in predictions))
    return float(np.mean(clips))


def _frdiv(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean squared difference of two predictions for one clip."""
    return float(np.mean([_mean_square(torch.from_numpy(predictions)) for predictions in pred]))


def _frvar(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean variance over time."""
    return float(torch.from_numpy(pred).var(dim=2).mean())


def _frdvs(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean squared difference of the k-th predictions for two clips."""
    return float(np.mean([_mean_square(torch.from_numpy(pred[:, k])) for k in range(pred.shape[1])]))


def _frsyn(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: Neighbours) -> float:
    """Mean over clips of the lag of the first prediction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean([_lag(predictions[0], one) for predictions, one in zip(pred, speaker, strict=True)]))


CHALLENGE: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Neighbours], float]] = {
    "FRCorr": _frcorr,
    "FRDist": _frdist,
    "FRDiv": _frdiv,
    "FRVar": _frvar,
    "FRDvs": _frdvs,
    "FRSyn": _frsyn,
}
"""Metric -> its function of a whole set: pred (clips, predictions, frames, 25), target and speaker (clips, frames, 25), all float32, and
for each clip the clips of target whose reaction suits its speaker."""


def _concordance(real: np.ndarray, predicted: np.ndarray) -> float:
    scores = []
    for x, y in zip(real.T, predicted.T, strict=True):
        correlation = np.corrcoef(x, y)[0, 1]
        spread = np.var(x) + np.var(y) + (np.mean(x) - np.mean(y)) ** 2
        scores.append(0.0 if math.isnan(correlation) else 2 * correlation * np.std(x) * np.std(y) / (spread + 1e-8))
    return float(np.mean(scores))


def _distance(real: np.ndarray, predicted: np.ndarray) -> float:
    groups = ((AU, 15), (VALENCE_AROUSAL, 1), (EXPRESSION, 8))
    return sum(_warped(np.ascontiguousarray(predicted[:, one]), np.ascontiguousarray(real[:, one])) / divisor for one, divisor in groups)


@numba.njit(nogil=True)
def _warped(x: np.ndarray, y: np.ndarray) -> float:
    """Dynamic time warping of (frames, features), Euclidean and without a band."""
    cost = np.full((len(x) + 1, len(y) + 1), np.inf)
    cost[0, 0] = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            distance = 0.0
            for feature in range(x.shape[1]):
                difference = x[i, feature] - y[j, feature]
                distance += difference * difference
            cost[i + 1, j + 1] = distance + min(cost[i, j + 1], cost[i + 1, j], cost[i, j])
    return math.sqrt(cost[-1, -1])


def _lag(predicted: np.ndarray, speaker: np.ndarray) -> int:
    curve = []
    for lag in range(-LARGEST_LAG, LARGEST_LAG + 1):
        x, y = predicted[max(lag, 0) : len(predicted) + min(lag, 0)], speaker[max(-lag, 0) : len(speaker) + min(-lag, 0)]
        curve.append(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(x.T, y.T, strict=True)]))
    return abs(LARGEST_LAG - int(np.argmax(curve)))  # of an undefined curve the first lag, as in theirs


def _mean_square(reactions: torch.Tensor) -> float:
    """Of the differences of two different ones."""
    flat = reactions.reshape(len(reactions), -1)
    pairs = len(flat) * (len(flat) - 1)
    return float((torch.cdist(flat, flat) ** 2).sum() / (pairs * flat.shape[1])) if pairs else math.nan
