"""FRDist: how far a prediction is from the nearest appropriate reaction, after the best warping of time.

The warping table is filled along its anti-diagonals, whose cells do not depend on each other. What cannot win is given up
early, and only that: the answer is the same as from full tables.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import numba
import numpy as np

from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.metrics.compiled import kernel

# A slice of attributes and the divisor of its distance. The cheapest and heaviest comes first: it says who is likely the nearest.
GROUPS = ((VALENCE_AROUSAL, 1), (EXPRESSION, 8), (AU, 15))

# Squared costs this far above the limit are still followed, so that rounding can never rule out the winner.
SLACK = 1 + 1e-9

# Cells are computed in whole vectors of this many, so that no loop has a slow remainder.
LANES = 16

# Zeros before and after each series, for the cells that whole vectors reach beyond the table. They are never read by cells of it.
MARGIN = 2 * LANES

# One compilation serves all clips up to the challenges' 750 frames.
FRAMES = 750

Four = tuple[np.float32, np.float32, np.float32, np.float32]
SquaredCost = Callable[[np.ndarray, np.ndarray, int, float], float]


def laid_out(series: np.ndarray) -> np.ndarray:
    """Series (..., frames) as float32 in rows of a fixed pitch, (..., pitch), for `squared_cost` and `nearest`."""
    frames = series.shape[-1]
    laid = np.zeros((*series.shape[:-1], _pitch(frames)), np.float32)
    laid[..., MARGIN : MARGIN + frames] = series
    return laid


def nearest(reversed_prediction: np.ndarray, listeners: Sequence[np.ndarray], frames: int) -> float:
    """The smallest distance of one prediction to any of the listeners (FRDist of one prediction).

    The distance is DTW(AU) / 15 + DTW(valence, arousal) + DTW(expressions) / 8, each DTW with a path of its own, without a
    band, and the square root of the summed squared frame distances (REACT 2023 challenge, arXiv:2306.06583).

    Args:
        reversed_prediction: (25, pitch), laid out, the last frame first.
        listeners: (25, pitch) each, laid out.
        frames: of all of them.
    """
    (group, divisor), *others = GROUPS
    costs = [squared_cost(listener[group], reversed_prediction[group], frames, math.inf) for listener in listeners]
    best = math.inf
    for cost, listener in sorted(zip(costs, listeners, strict=True), key=operator.itemgetter(0)):  # the likely nearest first
        total = math.sqrt(cost) / divisor
        for other, share in others:
            if total >= best:
                break
            limit = (share * (best - total)) ** 2 * SLACK
            total += math.sqrt(squared_cost(listener[other], reversed_prediction[other], frames, limit)) / share
        best = min(best, total)
    return best


def squared_cost(x: np.ndarray, reversed_y: np.ndarray, frames: int, limit: float) -> float:
    """The smallest sum of squared frame distances along a warping path; infinity if it exceeds the limit.

    Frame distances are float32, as the official inputs are; their sums along the path are float64.

    Args:
        x: (features, pitch), laid out.
        reversed_y: (features, pitch), laid out, the last frame first: an anti-diagonal then reads both forwards.
        frames: of both.
        limit: cells above it are given up.
    """
    features, pitch = x.shape
    assert reversed_y.shape == x.shape and pitch == _pitch(frames)
    return _kernel(features, pitch)(x.ravel(), reversed_y.ravel(), frames, limit)


def _pitch(frames: int) -> int:
    """Length of a row: room for both margins, in an odd number of vectors, so that rows do not compete for the same cache lines."""
    return (-(-(max(frames, FRAMES) + 2 * MARGIN) // LANES) | 1) * LANES


@functools.cache
def _kernel(features: int, pitch: int) -> SquaredCost:
    """`squared_cost` for flat rows. Constant sizes let the compiler see that all rows are one array: it then makes vector code."""
    half = min(features, 8)

    @kernel(error_model="numpy", fastmath={"contract"})
    def cost(x: np.ndarray, y: np.ndarray, frames: int, limit: float) -> float:
        # Cell (i, d - i) of anti-diagonal d stands at i - d // 2 + middle: below its diagonal predecessor of d - 2, whose place it takes.
        middle = (frames + 1) // 2 + MARGIN
        even, odd = np.full(pitch, np.inf), np.full(pitch, np.inf)
        step = np.empty(4 * pitch, np.float32)
        _frame_distances(x, y, MARGIN - middle, MARGIN + frames - 1 - middle, middle, middle + 1, step, features, half, pitch)
        even[middle] = step[middle]
        # Live cells of the last two diagonals, [low, high). All others are infinite, or beyond the table's end, whence no path returns.
        low, high = middle, middle + 1
        for d in range(1, 2 * frames - 1, 4):
            m = d // 2
            start = max(low - 2, middle - m - 2, middle - frames + d + 1 - m) // LANES * LANES
            stop = -(-min(high + 2, middle + m + 4, middle + frames - m) // LANES) * LANES
            i, j = MARGIN - middle + m, MARGIN + frames - 1 - middle + m - d
            _frame_distances(x, y, i, j, start, stop, step, features, half, pitch)
            for pair in range(min(2, (2 * frames - 1 - d) // 2)):
                _advance(even[start - 1 : stop - 1], even[start:stop], step[2 * pair * pitch :][start:stop], odd[start:stop])
                _advance(odd[start:stop], odd[start + 1 : stop + 1], step[(2 * pair + 1) * pitch :][start:stop], even[start:stop])
            low, high = start, stop
            while low < high and min(even[low], odd[low]) > limit:
                even[low] = odd[low] = np.inf
                low += 1
            while low < high and min(even[high - 1], odd[high - 1]) > limit:
                high -= 1
                even[high] = odd[high] = np.inf
            if low == high:
                return np.inf
        return even[middle] if even[middle] <= limit else np.inf

    return cost


@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="always")
def _frame_distances(
    x: np.ndarray, y: np.ndarray, i: int, j: int, start: int, stop: int, out: np.ndarray, features: int, half: int, pitch: int
) -> None:
    """Four anti-diagonals at once, as neighbouring ones read the same frames.

    Two loops over features, as the compiler unrolls short ones only. Unsigned indices spare numba's test for negative ones. Inlined, so
    that sizes are constants here; had `cost` a function of its own for it, numba would not know it again in another process.
    """
    for w in range(start, stop):
        sums = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for feature in range(half):
            sums = _add_squares(sums, x, np.uint64(i + w + feature * pitch), y, np.uint64(j + w + feature * pitch))
        for feature in range(half, features):
            sums = _add_squares(sums, x, np.uint64(i + w + feature * pitch), y, np.uint64(j + w + feature * pitch))
        for diagonal in range(4):
            out[np.uint64(w + diagonal * pitch)] = sums[diagonal]


@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _add_squares(sums: Four, x: np.ndarray, i: np.uint64, y: np.ndarray, j: np.uint64) -> Four:
    """One feature's share of the distances of cells (i, j), (i + 1, j), (i + 1, j - 1) and (i + 2, j - 1); j counts backwards."""
    one = np.uint64(1)
    x0, x1, x2, y0, y1 = x[i], x[i + one], x[i + one + one], y[j], y[j - one]
    return sums[0] + (x0 - y0) ** 2, sums[1] + (x1 - y0) ** 2, sums[2] + (x1 - y1) ** 2, sums[3] + (x2 - y1) ** 2


@numba.njit(nogil=True, error_model="numpy")
def _advance(left: np.ndarray, right: np.ndarray, step: np.ndarray, diagonal: np.ndarray) -> None:
    for w in range(diagonal.shape[0]):
        diagonal[w] = min(min(left[w], right[w]), diagonal[w]) + step[w]
