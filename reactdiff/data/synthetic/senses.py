"""What extractors and a microphone make of a person: feature streams of fixed random networks, and a voice."""

import numpy as np

from reactdiff.clip import EXPRESSION, FRAME_RATE, VALENCE_AROUSAL
from reactdiff.data.keyed import generator
from reactdiff.data.synthetic.dyad import CHANNELS, INDEX
from reactdiff.data.synthetic.face import Face

SAMPLE_RATE = 16_000
WIDTHS = {"va": 8, "au": 64, "fer": 16}
"""Feature streams in the order of the official files, and their widths here."""

LOUDEST = 0.8
"""Amplitude of a full, stressed syllable."""


def features_of(face: Face, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The facial feature streams, (frames, width) float32 each: all of the face in `au`, its summaries in `va` and `fer`."""
    affect, expression = face.attributes[:, VALENCE_AROUSAL], face.attributes[:, EXPRESSION]
    seen = {"va": affect, "au": np.column_stack([face.activations, 5 * face.pose, affect]), "fer": expression}
    return {name: _extract(name, seen[name], rng) for name in WIDTHS}


def _extract(name: str, seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fixed network, `x A + tanh(2 x B + c)`, and a little noise."""
    linear, inner, offset = NETWORKS[name]
    rows = seen @ linear + np.tanh(2 * seen @ inner + offset)
    return (rows + 0.03 * rng.standard_normal(rows.shape)).astype(np.float32)


def _network(name: str, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = generator("synthetic", "extractor", name)
    return rng.standard_normal((inputs, WIDTHS[name])), rng.standard_normal((inputs, WIDTHS[name])), rng.standard_normal(WIDTHS[name])


NETWORKS = {name: _network(name, inputs) for name, inputs in {"va": 2, "au": len(CHANNELS) + 5, "fer": 8}.items()}


def voice_of(face: Face, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """What a microphone hears of a talking person, (640 frames,) in [-1, 1] at 16 kHz.

    Harmonics of a wandering pitch fall off geometrically, `sum r^k sin(k phi) = r sin(phi) / (1 - 2 r cos(phi) + r^2)` for k > 0,
    with a peak of `r / (1 - r^2)`, here scaled to 1. They swell with four syllables a second while the person talks, louder,
    brighter and higher under stress, over breath and hiss.
    """
    count = len(face.pose) * SAMPLE_RATE // FRAME_RATE
    seconds = np.arange(count, dtype=np.float32) / SAMPLE_RATE
    frames = np.arange(len(face.pose))
    talk, stress = (
        np.interp(seconds * FRAME_RATE, frames, face.activations[:, INDEX[name]]).astype(np.float32) for name in ("talk", "stress")
    )
    syllable = 0.55 + 0.45 * np.sin(2 * np.pi * (4 * seconds + rng.random(dtype=np.float32)))
    tune = 1 + 0.05 * np.sin(2 * np.pi * (0.7 * seconds + rng.random(dtype=np.float32))) + 0.3 * stress
    turns = np.cumsum(pitch / SAMPLE_RATE * tune, dtype=np.float64)
    phase = (2 * np.pi * (turns % 1)).astype(np.float32)
    bright = 0.5 + 0.15 * syllable + 0.2 * stress.clip(0, 1)
    buzz = (1 - bright**2) * np.sin(phase) / (1 - 2 * bright * np.cos(phase) + bright**2)
    breath = rng.standard_normal(count, dtype=np.float32)
    loudness = talk * syllable * (0.6 + 0.4 * stress)
    return (LOUDEST * loudness * (buzz + 0.1 * breath) + 0.002 * breath).clip(-1, 1)
