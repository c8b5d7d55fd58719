"""The lags that trained models have learnt: when a reaction changes after a moment of the speaker was replaced."""

from collections.abc import Callable

import numpy as np

from cluster.data.reader import Reader
from cluster.runs.saved import SavedRun
from reactdiff.clip import speaker_listener
from reactdiff.influence import by_lag, influence


def lag_profile(run: SavedRun, clips: int, progress: Callable[[int, int], None]) -> np.ndarray:
    """The mean change of a run's reactions by lag, over clips of the split that it is scored on; (2 pieces - 1,).

    Args:
        run: finished.
        clips: how many, the first ones; each one's moments are replaced by those of the clip half the split away.
        progress: told (clips done, clips in all).

    Raises:
        ValueError: if the split has one clip, which nobody can replace.
    """
    reader, model = Reader(run.dataset, run.clips, run.experiment.evaluation.split), run.model()
    (speaker, _), count = speaker_listener(0), min(clips, reader.clips)
    if reader.clips < 2:
        raise ValueError(f"split {run.experiment.evaluation.split} of {run.dataset.url} has {reader.clips} clip; at least 2 are needed")
    wanted, found = [(speaker, name) for name in model.hears], list[np.ndarray]()
    for clip in range(count):
        own, other = (
            {name: array.astype(np.float32) for (_, name), array in reader.read(which, wanted).arrays.items()}
            for which in (clip, (clip + reader.clips // 2) % reader.clips)
        )
        found.append(by_lag(influence(model, own, other, (reader.key(clip), 0), run.experiment.seed)))
        progress(clip + 1, count)
    return np.mean(found, axis=0)
