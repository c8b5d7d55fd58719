"""How much each key of a space matters: the share of the variance of what was measured that lies between its values.

Of few trials chance alone puts much of it there: groups of pure noise differ. What chance is expected to give is taken off.
"""

from collections.abc import Sequence

import numpy as np

from cluster.studies.space import Point, Space

BINS = 4
"""Groups of equally many trials that the values of a range are put into, at most."""

EACH = 4
"""Trials of such a group, at least: of smaller ones also what is left of chance is much."""


def importance(space: Space, points: Sequence[Point], values: Sequence[float]) -> dict[str, float]:
    """Main effects (epsilon squared; Kelley, 1935): key -> share in [0, 1]; shares of a full grid add up to at most 1.

    Args:
        space: what was searched.
        points: that were tried.
        values: what each of them reached.

    Returns:
        The keys that took more than one value among trials that differ, one of them more than once; a key with conditions is judged among
        trials in which it counts.
    """
    found = {}
    for key, dimension in space.dimensions.items():
        there = [(point[key], value) for point, value in zip(points, values, strict=True) if key in point]
        reached = np.array([value for _, value in there])
        if dimension.choice:
            groups = np.array([dimension.choice.index(one) for one, _ in there])
        else:
            order = np.argsort(np.argsort([one for one, _ in there], kind="stable"), kind="stable")
            groups = order * min(BINS, max(1, len(there) // EACH)) // max(1, len(there))
        trials, kinds = len(there), set(groups.tolist())
        if not 1 < len(kinds) < trials or not np.ptp(reached):
            continue
        within = sum(np.sum((reached[groups == kind] - reached[groups == kind].mean()) ** 2) for kind in kinds)
        left = within / np.sum((reached - reached.mean()) ** 2)
        found[key] = max(0.0, float(1 - left * (trials - 1) / (trials - len(kinds))))
    return found
