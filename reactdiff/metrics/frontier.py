"""The frontier: the FRCorr that an oracle reaches at each FRDiv, by averaging more or fewer of its draws into a prediction.

FRCorr pays for averaging, so a model that shows less variety scores more than it knows. Its share of the frontier says how much of what
can be known it knows, at the variety that it shows.
"""

from collections.abc import Sequence

import numpy as np

from reactdiff.metrics.intervals import percentiles, resampled_means


def frontier_share(agreement: float, diversity: float, frontier: Sequence[Sequence[float]]) -> float:
    """FRCorr over that of the frontier at the same FRDiv.

    Args:
        agreement: FRCorr of the model.
        diversity: FRDiv of the model.
        frontier: FRCorr and FRDiv of an oracle's draws and of means of them; between two of these it is a straight line, and beyond
            the last ones level: an oracle's draws have all the variety there is, and the mean of all of them has none.

    Returns:
        NaN where the frontier is not above 0.
    """
    points = np.array(sorted((spread, height) for height, spread in frontier))
    there = float(np.interp(diversity, points[:, 0], points[:, 1]))
    return agreement / there if there > 0 else float("nan")


def share_interval(
    model: np.ndarray, frontier: Sequence[np.ndarray], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """A percentile bootstrap interval of the share over clips, which are drawn for model and oracles together.

    Args:
        model: FRCorr and FRDiv of each clip, (clips, 2).
        frontier: the same of each point of the frontier, the clips in the same order.
        seed: of the draws.
        resamples: how many.
        level: share of the resamples inside the interval, in (0, 1).
    """
    means = resampled_means(np.concatenate([model, *frontier], axis=1), seed, resamples)
    shares = [frontier_share(own[0], own[1], points) for own, *points in means.reshape(resamples, -1, 2).tolist()]
    return percentiles(np.array(shares), level)
