"""Ground truth of a split: which reactions are appropriate to which speakers, and what both persons really did.

An item is (clip, direction), row clip + clips * direction.
"""

from collections.abc import Sequence

import numpy as np

from cluster.data.manifest import Manifest, load_appropriateness
from cluster.data.reader import Reader
from cluster.storage import Store
from cluster.storage.parallel import parallel_map
from reactdiff.clip import speaker_listener
from reactdiff.metrics.official import score_part
from reactdiff.metrics.partial import PartialScores


class GroundTruth:
    """The first clips of a split, with their part of the appropriateness matrix.

    Args:
        store: the dataset.
        manifest: its state.
        split: of it; it must have a matrix.
        clips: how many, the first ones.
    """

    def __init__(self, store: Store, manifest: Manifest, split: str, clips: int):
        self.clips, self.reader = clips, Reader(store, manifest, split)
        matrix = load_appropriateness(store, manifest, split)
        assert matrix is not None
        self.matrix = of_first_clips(matrix, clips).astype(bool)

    def clip_and_direction(self, item: int) -> tuple[int, int]:
        """(clip, direction) of an item."""
        return item % self.clips, item // self.clips

    def key(self, item: int) -> tuple[str, int]:
        """(clip key, direction) of an item."""
        clip, direction = self.clip_and_direction(item)
        return self.reader.key(clip), direction

    def speaker(self, item: int) -> np.ndarray:
        """The speaker's attributes, (frames, 25)."""
        return self._attributes(item, 0)

    def listener(self, item: int) -> np.ndarray:
        """The real reaction, (frames, 25)."""
        return self._attributes(item, 1)

    def score(self, items: Sequence[int], predictions: np.ndarray) -> PartialScores:
        """Score predictions (items, K, frames, 25)."""
        neighbours = [np.flatnonzero(self.matrix[item]) for item in items]
        others = np.unique(np.concatenate([*neighbours, items])).tolist()
        targets = dict(zip(others, parallel_map(self.listener, others), strict=True))
        return score_part(predictions, targets, np.stack(list(parallel_map(self.speaker, items))), neighbours, own=items)

    def _attributes(self, item: int, role: int) -> np.ndarray:
        clip, direction = self.clip_and_direction(item)
        source = (speaker_listener(direction)[role], "attributes")
        return self.reader.read(clip, [source]).arrays[source]


def of_first_clips(matrix: np.ndarray, clips: int) -> np.ndarray:
    """The part of a (2n, 2n) matrix that is about the first clips, (2 clips, 2 clips)."""
    chosen = np.concatenate((np.arange(clips), len(matrix) // 2 + np.arange(clips)))
    return matrix[np.ix_(chosen, chosen)]
