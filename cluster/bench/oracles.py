"""What can be known of simulated clips: every oracle of the ladder and retrieval, scored without a model or a dataset on disk."""

import numpy as np

from cluster.evaluation.rows import RANDOM, retrieval_name
from cluster.studies.comparison_table import TableRow
from cluster.studies.kept_scores import ClipScores
from reactdiff.clip import WINDOW
from reactdiff.data.paths import key_of
from reactdiff.data.synthetic.oracles import ladder, oracle_draws
from reactdiff.data.synthetic.simulation import Simulation, dyad
from reactdiff.metrics.baselines import random_listener, strangers
from reactdiff.metrics.official import Progress, score_part
from reactdiff.metrics.partial import PartialScores, total
from reactdiff.metrics.retrieval import Retrieval

BESIDE = (0, WINDOW, 10)
"""Chunks of the models that the table of docs/science.md stands beside."""


def score_oracles(simulation: Simulation, split: str, predictions: int, chunks: tuple[int, ...], progress: Progress) -> dict[str, TableRow]:
    """Rows of the comparison's table: a random listener, and retrieval and oracles beside models that react in each of these chunks.

    Args:
        simulation: whose clips; retrieval searches those of its split `train`.
        split: of it that is scored.
        predictions: reactions to each speaker.
        chunks: frames, 0 for models that hear the whole clip.
        progress: told (items done, items in all).
    """
    rungs = {name: knows for chunk in chunks for name, knows in ladder(chunk).items()}
    clips = simulation.clips[split]
    speakers, real = _both_directions(simulation, split)
    recordings = _both_directions(simulation, "train")
    searches = {retrieval_name(chunk): Retrieval(*recordings, chunk) for chunk in chunks}
    scripts = np.array([simulation.script(clip) for clip in range(clips)])
    suits = np.kron(np.eye(2, dtype=bool), scripts[:, None] == scripts)
    others = strangers(suits)
    items = [(key_of(simulation.paths(split, clip)[0]), direction) for direction in (0, 1) for clip in range(clips)]
    parts: dict[str, list[PartialScores]] = {name: [] for name in (RANDOM, *searches, *rungs)}
    for item, key in enumerate(items):
        whose = random_listener(items[item : item + 1], others[item : item + 1], predictions, seed=0)[0]
        near, speaker = [np.flatnonzero(suits[item])], speakers[item : item + 1]
        parts[RANDOM].append(score_part(real[None, whose], real, speaker, near))
        for name, search in searches.items():
            parts[name].append(score_part(search.react(speaker[0], predictions, key)[None], real, speaker, near))
        for name, knows in rungs.items():
            drawn = oracle_draws(simulation, split, item % clips, key[1], knows, predictions)
            parts[name].append(score_part(drawn[None], real, speaker, near))
        progress(item + 1, len(items))
    return {name: TableRow({0: ClipScores.of(total(each))}) for name, each in parts.items()}


def _both_directions(simulation: Simulation, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Attributes of speakers and of listeners of a split, (2 clips, frames, 25) each: all plain pairs, then the same mirrored."""
    clips = range(simulation.clips[split])
    faces = np.stack([[face.attributes[: simulation.frames] for face in dyad(simulation, split, clip)] for clip in clips])
    return np.concatenate([faces[:, 0], faces[:, 1]]), np.concatenate([faces[:, 1], faces[:, 0]])
