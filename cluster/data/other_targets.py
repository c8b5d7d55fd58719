"""Other targets: of some items the target is that of another clip, whose listener reacted appropriately to the same speaker.

The condition stays the item's own, so order and exactly-once do, too. Whether an item has another target, and whose, is a function of seed
and position.
"""

from collections.abc import Collection, Sequence

import numpy as np

from cluster.config.schema import Experiment
from cluster.data.manifest import load_appropriateness, load_manifest
from cluster.storage import Store
from reactdiff.diffusion.noise import training_chance


class OtherTargets:
    """Whose target an item has.

    Args:
        matrix: (2n, 2n) bool, which reactions are appropriate for which speakers, row clip + n * direction.
        seed: of the experiment.
        probability: that an item has another one's target, if there is any for it.
        names: what of an item is its target, as its batch names it.
        left_out: clips that are nobody's target.
    """

    def __init__(self, matrix: np.ndarray, seed: int, probability: float, names: Collection[str], left_out: Collection[int] = ()):
        self.names, self._seed, self._probability, self._clips = names, seed, probability, len(matrix) // 2
        taken = np.ones(len(matrix), dtype=bool)
        taken[[row for clip in left_out for row in (clip, clip + self._clips)]] = False
        each = [np.flatnonzero(matrix[row] & taken).astype(np.int32) for row in range(len(matrix))]
        each = [others[others != row] for row, others in enumerate(each)]
        self._begin, self._columns = np.cumsum([0, *map(len, each)]), np.concatenate(each)

    def of(self, items: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """The items (2 * clip + direction) whose targets these items have at these positions, (n,) each."""
        chosen = items.copy()
        for place, (item, position) in enumerate(zip(items.tolist(), positions, strict=True)):
            chance, where = training_chance(self._seed, position, "training target", 2)
            row = item // 2 + self._clips * (item % 2)
            begin, end = self._begin[row], self._begin[row + 1]
            if chance < self._probability and begin < end:
                direction, clip = divmod(int(self._columns[begin + int(where * (end - begin))]), self._clips)
                chosen[place] = 2 * clip + direction
        return chosen


def read_other_targets(
    experiment: Experiment, clips: tuple[Store, str] | None, names: Collection[str], left_out: Collection[int]
) -> OtherTargets | None:
    """Whose targets items have, by what the dataset of clips says; None where each has its own.

    Args:
        experiment: the run's configuration.
        clips: that dataset, and the hash of its state.
        names: as `OtherTargets`.
        left_out: as `OtherTargets`.
    """
    if not (probability := experiment.diffusion.other_target) or not names:
        return None
    assert clips
    store, digest = clips
    matrix = load_appropriateness(store, load_manifest(store, digest), experiment.data.split)
    assert matrix is not None  # a run is checked before it begins
    return OtherTargets(matrix, experiment.seed, probability, names, left_out)
