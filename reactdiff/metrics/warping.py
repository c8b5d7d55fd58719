"""FRDist: how far a prediction is from the nearest appropriate reaction, after the best warping of time.

The warping table is filled along its anti-diagonals, whose cells do not depend on each other. What cannot win is given up
early, and only that: the answer is the same as from full tables.
"""

import math
from collections.abc import Iterable, Sequence

import numba
import numpy as np

from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL

# A slice of attributes and the divisor of its distance. The cheapest and heaviest comes first: it rules out most listeners.
GROUPS = ((VALENCE_AROUSAL, 1), (EXPRESSION, 8), (AU, 15))

# Squared costs this far above the limit are still followed, so that rounding can never rule out the winner.
SLACK = 1 + 1e-9


def nearest(reversed_prediction: np.ndarray, listeners: Sequence[np.ndarray], order: Iterable[int]) -> float:
    """The smallest distance of one prediction to any of the listeners (FRDist of one prediction).

    The distance is DTW(AU) / 15 + DTW(valence, arousal) + DTW(expressions) / 8, each DTW with a path of its own, without a
    band, and the square root of the summed squared frame distances (REACT 2023 challenge, arXiv:2306.06583).

    Args:
        reversed_prediction: (25, frames) float32, the last frame first, C-contiguous.
        listeners: (25, frames) float32 each, C-contiguous.
        order: indices of the listeners, the likely nearest first; it decides the time taken, never the answer.
    """
    best = math.inf
    for listener in order:
        total = 0.0
        for group, divisor in GROUPS:
            limit = (divisor * (best - total)) ** 2 * SLACK
            total += math.sqrt(squared_cost(listeners[listener][group], reversed_prediction[group], limit)) / divisor
            if total >= best:
                break
        best = min(best, total)
    return best


@numba.njit(nogil=True, error_model="numpy")
def squared_cost(x: np.ndarray, reversed_y: np.ndarray, limit: float) -> float:
    """The smallest sum of squared frame distances along a warping path; infinity if it exceeds the limit.

    Frame distances are float32, as the official inputs are; their sums along the path are float64.

    Args:
        x: (features, frames) float32, C-contiguous.
        reversed_y: (features, frames) float32, C-contiguous, the last frame first: an anti-diagonal then reads both forwards.
        limit: cells above it are given up.
    """
    frames = x.shape[1]
    steps = np.empty(frames, np.float32)
    # Cell (i, d - i) of anti-diagonal d stands at index i + 1; what was never reached is infinite.
    before_last = np.full(frames + 2, np.inf)
    last = np.full(frames + 2, np.inf)
    now = np.full(frames + 2, np.inf)
    before_last[0] = 0.0
    # Live cells of the last two diagonals, [low, high); only their successors are computed.
    low, high, old_low, old_high = 0, 0, -1, 0
    for d in range(2 * frames - 1):
        start = max(min(low, old_low + 1), d - frames + 1, 0)
        stop = min(max(high, old_high) + 1, d + 1, frames)
        if start >= stop:
            return np.inf
        step = steps[: stop - start]
        _frame_distances(x, reversed_y, start, start + frames - 1 - d, step)
        _advance(before_last[start:stop], last[start : stop + 1], step, now[start + 1 : stop + 1])
        now[start] = now[stop + 1] = np.inf
        old_low, old_high, low, high = low, high, start, stop
        while low < high and now[low + 1] > limit:
            low += 1
        while low < high and now[high] > limit:
            high -= 1
        if low == high:
            low, high = frames, 0
        before_last, last, now = last, now, before_last
    return float(last[frames]) if last[frames] <= limit else np.inf


@numba.njit(nogil=True, error_model="numpy")
def _frame_distances(x: np.ndarray, y: np.ndarray, i: int, j: int, out: np.ndarray) -> None:
    for feature in range(x.shape[0]):
        xs, ys = x[feature], y[feature]
        for k in range(out.shape[0]):
            # Unsigned indices spare numba's test for negative ones, which would keep the loop from becoming vector code.
            difference = xs[np.uint64(i + k)] - ys[np.uint64(j + k)]
            out[k] = difference * difference + (out[k] if feature else np.float32(0))


@numba.njit(nogil=True, error_model="numpy")
def _advance(diagonal: np.ndarray, nearby: np.ndarray, step: np.ndarray, out: np.ndarray) -> None:
    left = nearby[1:]
    for k in range(out.shape[0]):
        out[k] = min(min(nearby[k], left[k]), diagonal[k]) + step[k]
