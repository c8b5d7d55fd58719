"""Predictions that need no model. A model is worth something only where it beats them.

Each returns (clips, predictions, frames, 25) float32, but for `random_listener`, which says whose reactions these are. Random
numbers are keyed by (seed, clip key, direction, prediction), so any part of a split can be made anywhere. An *item* is a
(clip key, direction) pair.
"""

from collections.abc import Sequence

import numpy as np

from reactdiff.clip import ATTRIBUTES
from reactdiff.data.keyed import generator

Item = tuple[str, int]


def noise(items: Sequence[Item], predictions: int, frames: int, seed: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1): the most diverse prediction, and the least appropriate."""
    shape = (frames, len(ATTRIBUTES))
    return np.stack(
        [
            [generator("noise", seed, key, direction, k).random(shape, dtype=np.float32) for k in range(predictions)]
            for key, direction in items
        ]
    )


def strangers(appropriate: np.ndarray) -> np.ndarray:
    """Who had another conversation than whom: items of clips none of which suits the other, whoever speaks in either.

    The other direction of a clip of the same script suits nobody in this one, but there the listener is who speaks here. Where all clips
    have one script, strangers are those items alone of which none suits the other.

    Args:
        appropriate: (2 clips, 2 clips) bool, the appropriateness matrix; items i and i + clips are one clip.

    Returns:
        Of the same shape, bool, symmetric but for who has no other script.
    """
    near = appropriate | appropriate.T
    clips = len(near) // 2
    same_script = np.tile(near.reshape(2, clips, 2, clips).any(axis=(0, 2)) | np.eye(clips, dtype=bool), (2, 2))
    alone = same_script.all(axis=1, keepdims=True)
    return ~np.where(alone, near, same_script)


def random_listener(items: Sequence[Item], strange: np.ndarray, predictions: int, seed: int) -> np.ndarray:
    """Whose real reactions to predict: strangers' listeners, what a model scores that looks right and never listens.

    Args:
        items: n of them.
        strange: (n, all items) bool, the items' rows of `strangers`.
        predictions: how many for each item, drawn with replacement.
        seed: of the draw.

    Returns:
        (n, predictions) int64, items of the split.

    Raises:
        ValueError: if a row leaves none to draw from.
    """
    drawn = np.empty((len(items), predictions), dtype=np.int64)
    for row, (key, direction) in enumerate(items):
        others = np.flatnonzero(strange[row])
        if len(others) == 0:
            raise ValueError(
                f"no clip is of a stranger to {key} in direction {direction}, so that no reaction is left to draw; use a larger split"
            )
        drawn[row] = [others[generator("random_listener", seed, key, direction, k).integers(len(others))] for k in range(predictions)]
    return drawn


def mean_reaction(clips: int, predictions: int, frames: int, mean: np.ndarray) -> np.ndarray:
    """The training set's mean (25,) at every frame: what a model that minimises squared error falls back to. A read-only view."""
    return np.broadcast_to(mean.astype(np.float32, copy=False), (clips, predictions, frames, len(ATTRIBUTES)))


def mimic(speaker: np.ndarray, predictions: int) -> np.ndarray:
    """The speaker's own behaviour (clips, frames, 25), copied. A read-only view."""
    clips, frames, width = speaker.shape
    return np.broadcast_to(speaker.astype(np.float32, copy=False)[:, None], (clips, predictions, frames, width))
