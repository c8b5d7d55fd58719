"""What is seen of a person: activations of face and head, and the attributes and coefficients they amount to."""

from dataclasses import dataclass

import numpy as np

from reactdiff.clip import ACTION_UNITS, ATTRIBUTES, EXPRESSIONS, FRAME_RATE
from reactdiff.data.keyed import generator
from reactdiff.data.synthetic.dyad import CHANNEL, CHANNELS, INDEX, LENGTH, ONSET, STRENGTH

RISE, FALL = 0.24, 0.5
"""Seconds an event takes to come and to go."""

ON = 0.5
"""An action unit is present where its channels add up to more than this."""

UNIT_LOADS = {
    "AU1": {"brow": 1.0},
    "AU2": {"brow": 0.8},
    "AU4": {"frown": 1.0},
    "AU6": {"smile": 0.8, "squint": 0.3},
    "AU7": {"squint": 1.0},
    "AU9": {"sneer": 0.75},
    "AU10": {"sneer": 1.0},
    "AU12": {"smile": 1.0},
    "AU14": {"dimple": 1.0},
    "AU15": {"droop": 1.0},
    "AU17": {"droop": 0.75, "press": 0.5},
    "AU23": {"press": 0.8},
    "AU24": {"press": 1.0},
    "AU25": {"talk": 0.8, "stress": 0.4},
    "AU26": {"stress": 0.9, "talk": 0.2},
}
AFFECT_LOADS = {
    "valence": {"smile": 1.0, "nod": 0.4, "dimple": 0.2, "droop": -0.8, "press": -0.6, "frown": -0.5, "sneer": -0.5},
    "arousal": {"smile": 0.6, "squint": 0.5, "nod": 0.5, "brow": 0.5, "stress": 0.5, "talk": 0.3, "droop": -0.6, "dimple": -0.3},
}
EXPRESSION_LOADS = {
    "Neutral": {},
    "Happy": {"smile": 5.0},
    "Sad": {"droop": 4.5},
    "Surprise": {"brow": 4.0},
    "Fear": {"brow": 2.0, "frown": 2.0},
    "Disgust": {"sneer": 4.0},
    "Anger": {"press": 3.5, "frown": 2.0},
    "Contempt": {"dimple": 4.5},
}
RESTING = np.array([0.0, -2.5, -2.5, -3.0, -3.5, -3.0, -3.0, -2.5])
"""Logits of the eight expressions of a face at rest."""


@dataclass(frozen=True)
class Face:
    """One person's visible behaviour, one row per video frame.

    Attributes:
        activations: (frames, 12) of `CHANNELS`, 0 at rest and about 1 in full.
        pose: (frames, 3) head pitch, yaw and roll in radians.
        attributes: (frames, 25) of `reactdiff.clip.ATTRIBUTES`.
    """

    activations: np.ndarray
    pose: np.ndarray
    attributes: np.ndarray


def face_of(events: np.ndarray, frames: int, rng: np.random.Generator) -> Face:
    """How a person with these events looks."""
    return face_from(activation(events, frames), rng)


def face_from(activations: np.ndarray, rng: np.random.Generator) -> Face:
    """How a person with these activations (frames, 12) looks, with a mood that drifts and a head that sways."""
    frames = len(activations)
    mood, sway, tremor = drift(frames, 2, rng), drift(frames, 3, rng), drift(frames, len(ACTION_UNITS), rng, fastest=3.0)
    seconds = np.arange(frames) / FRAME_RATE
    nodding = 0.12 * np.sin(2 * np.pi * (2.2 * seconds + rng.random())) * activations[:, INDEX["nod"]]
    tilting = 0.2 * activations[:, INDEX["tilt"]]
    pose = 0.03 * sway + np.column_stack([nodding, np.zeros(frames), tilting])
    units = activations @ _loads(UNIT_LOADS) + 0.04 * tremor > ON
    affect = np.tanh(smoothed(activations @ _loads(AFFECT_LOADS)) + 0.2 * mood)
    logits = RESTING + smoothed(activations, seconds=0.1) @ _loads(EXPRESSION_LOADS) + 0.1 * drift(frames, len(EXPRESSIONS), rng)
    odds = np.exp(logits)
    attributes = np.column_stack([units, affect, odds / odds.sum(axis=1, keepdims=True)])
    assert attributes.shape == (frames, len(ATTRIBUTES))
    return Face(activations, pose, attributes.astype(np.float32))


def activation(events: np.ndarray, frames: int, first: int = 0) -> np.ndarray:
    """Events as smooth activations from the frame `first` on, (frames, 12): each comes, stays its length, and goes.

    A channel tops out at 1.3.
    """
    since = np.arange(first, first + frames) / FRAME_RATE - events[:, ONSET, None]
    course = _smoothstep(since / RISE) * (1 - _smoothstep((since - RISE - events[:, LENGTH, None]) / FALL))
    channels = events[:, CHANNEL].astype(int)[:, None] == np.arange(len(CHANNELS))
    return np.minimum((course * events[:, STRENGTH, None]).T @ channels, 1.3)


def drift(frames: int, width: int, rng: np.random.Generator, fastest: float = 0.25) -> np.ndarray:
    """Smooth wandering of unit variance, (frames, width): four slow sines each, up to `fastest` Hz."""
    rates, phases = rng.uniform(fastest / 8, fastest, (2, 4, width)) * np.array([1, 1 / fastest]).reshape(2, 1, 1)
    seconds = np.arange(frames)[:, None, None] / FRAME_RATE
    return np.sin(2 * np.pi * (seconds * rates + phases)).sum(axis=1) / np.sqrt(2)


def smoothed(rows: np.ndarray, seconds: float = 0.2) -> np.ndarray:
    """An exponential average over the past, (frames, width) -> (frames, width); before the first row it was like the first."""
    taps = np.exp(-np.arange(int(8 * seconds * FRAME_RATE)) / (seconds * FRAME_RATE))
    taps /= taps.sum()
    before = np.repeat(rows[:1], len(taps) - 1, axis=0)
    return np.stack([np.convolve(column, taps, mode="valid") for column in np.concatenate([before, rows]).T], axis=1)


def coefficients_of(face: Face, rng: np.random.Generator) -> np.ndarray:
    """FaceVerse coefficients minus the mean face, (frames, 58): expression from the activations, rotation and translation."""
    expression = face.activations @ EXPRESSION_BASIS + 0.01 * rng.standard_normal((len(face.pose), EXPRESSION_BASIS.shape[1]))
    return np.column_stack([expression, face.pose, 0.5 * face.pose + 0.01 * drift(len(face.pose), 3, rng)]).astype(np.float32)


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = x.clip(0, 1)
    return x * x * (3 - 2 * x)


def _loads(table: dict[str, dict[str, float]]) -> np.ndarray:
    """A table of loads as a matrix (channels, rows of the table)."""
    return np.array([[row.get(channel, 0.0) for row in table.values()] for channel in CHANNELS])


def _expression_basis() -> np.ndarray:
    rng = generator("synthetic", "expression basis")
    return 0.4 * rng.standard_normal((len(CHANNELS), 52)) * (rng.random((len(CHANNELS), 52)) < 0.25)


EXPRESSION_BASIS = _expression_basis()
"""Which expression coefficients a channel moves, (12, 52): about a quarter of them each."""
