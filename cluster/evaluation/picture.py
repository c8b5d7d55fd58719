"""Pictures of reactions to a clip: those that jobs/generate.py draws, and the one that an evaluated run keeps beside its scores."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.data.reader import ArrayKey, Reader
from cluster.evaluation.plan import plan_evaluation
from cluster.evaluation.rows import predictions_file
from cluster.runs.saved import SavedRun
from reactdiff.clip import PERSONS, speaker_listener
from reactdiff.plot import reactions_png

MAX_REACTIONS = 10
"""Reactions in the picture that a run keeps."""


@dataclass(frozen=True)
class KeptPicture:
    """Where a run's picture is, and which clip it shows."""

    url: str
    split: str
    clip: str


def read_faces(reader: Reader, clip: int) -> dict[ArrayKey, np.ndarray]:
    """Both persons' attributes, (frames, 25) each, as `clip_picture` takes them.

    Raises:
        CorruptData: if the clip is damaged.
        StorageError: if it cannot be read.
    """
    return reader.read(clip, [(person, "attributes") for person in PERSONS]).arrays


def clip_picture(key: str, faces: Mapping[ArrayKey, np.ndarray], direction: int, reactions: np.ndarray, whose: str) -> bytes:
    """A PNG of reactions to a clip, over the real listener's.

    Args:
        key: of the clip.
        faces: what both persons do, of `read_faces`.
        direction: who speaks.
        reactions: attributes (K, frames, 25).
        whose: what generated them, for the title.
    """
    speaker, listener = speaker_listener(direction)
    title = f"Reactions to clip {key}: {speaker} speaks, {listener} listens ({whose})"
    return reactions_png(title, faces[speaker, "attributes"], faces[listener, "attributes"], reactions)


def keep_picture(run: SavedRun) -> KeptPicture:
    """Draw the reactions to the first clip that a run's evaluation has scored, unless that is done; nothing is generated anew.

    Args:
        run: that was evaluated.

    Raises:
        ValueError: if the run has no weights that can be evaluated, or data are damaged.
        StorageError: if something cannot be read or written; NotFound if this was not evaluated.
    """
    plan = plan_evaluation(run.experiment, run.store, run.latents(), run.diffusion())
    reader = Reader(run.dataset, run.clips, plan.split)
    name = f"evaluation/{plan.split}-{plan.id}.png"
    if not run.store.exists(name):
        part = run.store.read(predictions_file(plan, 0))
        reactions = np.load(io.BytesIO(part), allow_pickle=False)[0, :MAX_REACTIONS]
        run.store.put(name, clip_picture(reader.key(0), read_faces(reader, 0), 0, reactions, f"run {run.experiment.run.name}"))
    return KeptPicture(f"{run.store.url}/{name}", plan.split, reader.key(0))
