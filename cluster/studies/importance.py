"""How much each key of a space matters: the share of the variance of what was measured that lies between its values."""

from collections.abc import Sequence

import numpy as np

from cluster.studies.space import Point, Space

BINS = 4
"""Groups of equally many trials that the values of a range are put into."""


def importance(space: Space, points: Sequence[Point], values: Sequence[float]) -> dict[str, float]:
    """Main effects (Fisher's analysis of variance): key -> share in [0, 1]; shares of a full grid add up to at most 1.

    Args:
        space: what was searched.
        points: that were tried.
        values: what each of them reached.

    Returns:
        The keys that took more than one value among trials that differ; a key with conditions is judged among trials in which it counts.
    """
    found = {}
    for key, dimension in space.dimensions.items():
        there = [(point[key], value) for point, value in zip(points, values, strict=True) if key in point]
        reached = np.array([value for _, value in there])
        if dimension.choice:
            groups = np.array([dimension.choice.index(one) for one, _ in there])
        else:
            order = np.argsort(np.argsort([one for one, _ in there], kind="stable"), kind="stable")
            groups = order * min(BINS, max(1, len(there) // 2)) // max(1, len(there))
        if len(set(groups.tolist())) < 2 or not np.ptp(reached):
            continue
        between = sum(np.sum(groups == group) * (reached[groups == group].mean() - reached.mean()) ** 2 for group in set(groups.tolist()))
        found[key] = float(between / np.sum((reached - reached.mean()) ** 2))
    return found
