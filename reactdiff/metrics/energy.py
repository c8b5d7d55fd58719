"""The energy score: how near the draws of a clip are to its appropriate reactions, less what they owe to being alike.

A proper score (Gneiting and Raftery, 2007): who draws from the truth cannot be beaten on average, neither by averaging draws, as
FRCorr can, nor by noise, as diversity can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reactdiff.metrics.agreement import Reaction
from reactdiff.metrics.compiled import kernel


@dataclass(frozen=True)
class EnergyScores:
    """Both energy scores of one clip; NaN for a single prediction, whose spread nobody knows.

    Attributes:
        attribute: distances are root mean squares over time of each attribute, then the mean of the 25: it sees time.
        frame: distances are root mean squares over the attributes of each frame, then the mean over time: it sees a face whole.
    """

    attribute: float
    frame: float


def energy_scores(predictions: Reaction, listeners: Sequence[Reaction]) -> EnergyScores:
    """Mean distance of the predictions to the listeners, less half the mean distance of two different predictions.

    The second mean is over distinct pairs, so the expectation does not depend on how many predictions there are.

    Args:
        predictions: series (predictions, 25, frames).
        listeners: series (25, frames) each.
    """
    draws = predictions.series
    count = len(draws)
    if count < 2:
        return EnergyScores(float("nan"), float("nan"))
    to = np.mean([_mean_distances(draws, other.series) for other in listeners], axis=0)
    between = sum(_mean_distances(draws[k + 1 :], draws[k]) * (count - 1 - k) for k in range(count - 1)) / (count * (count - 1) / 2)
    attribute, frame = (to - between / 2).tolist()
    return EnergyScores(attribute, frame)


@kernel(error_model="numpy", fastmath={"reassoc", "contract"})
def _mean_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the series x (count, width, frames) to the one y (width, frames): (2,), by attribute and by frame, means over the count."""
    count, width, frames = x.shape
    found = np.zeros(2)
    of_frame = np.empty(frames, np.float32)
    for one in x:
        of_frame[:] = 0
        for attribute in range(width):
            xs, ys = one[attribute], y[attribute]
            total = np.float32(0)
            for t in range(frames):
                square = (xs[t] - ys[t]) ** 2
                total += square
                of_frame[t] += square
            found[0] += np.sqrt(np.float64(total) / frames) / width
        total = np.float32(0)
        for t in range(frames):
            total += np.sqrt(of_frame[t])
        found[1] += np.float64(total) / np.sqrt(width) / frames
    return found / count
