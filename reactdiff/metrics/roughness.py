"""Roughness: how far a reaction moves from one frame to the next, where a model may have seams and between them.

Every other metric can be met by a listener that flickers; this one cannot.
"""

import numpy as np

from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.metrics.agreement import Reaction
from reactdiff.metrics.compiled import kernel

SEAMS = (5, 10, 25, 50)
"""Frames of what models draw in one piece: tokens, chunks, windows. A step from the last frame of one to the next may be a jump."""

GROUPS = np.array([[group.start, group.stop] for group in (AU, VALENCE_AROUSAL, EXPRESSION)])
"""Which attributes count as one, as in FRDist: valence and arousal, which flicker first, are not lost among 25."""


def frame_steps(reaction: Reaction) -> np.ndarray:
    """Mean absolute difference of two frames that follow each other, (frames - 1,), over all of series (..., 25, frames)."""
    series = reaction.series.reshape(-1, *reaction.series.shape[-2:])
    return _steps(series, GROUPS)


def at_seams(steps: np.ndarray) -> np.ndarray:
    """Means of the steps (frames - 1,) inside pieces, which is wherever none of `SEAMS` is, and at the ends of each of `SEAMS`.

    Returns:
        (1 + len(SEAMS),), NaN where a clip is too short to have such a place.
    """
    after = np.arange(1, len(steps) + 1)  # the frame that a step leads to: the first of a piece, where it is a multiple
    ends = [after % length == 0 for length in SEAMS]
    return np.array([steps[where].mean() if where.any() else np.nan for where in (~np.any(ends, axis=0), *ends)])


@kernel(error_model="numpy")
def _steps(series: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The step at each time, (frames - 1,): a mean over the attributes of each group, then over the groups and the series."""
    count, _, frames = series.shape
    steps = np.zeros(frames - 1)
    for one in series:
        for first, last in groups:
            share = 1 / (count * len(groups) * (last - first))
            for attribute in range(first, last):
                row = one[attribute]
                for t in range(frames - 1):
                    steps[t] += abs(row[t + 1] - row[t]) * share
    return steps
