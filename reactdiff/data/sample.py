"""A clip in memory, and the description of its input streams."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

StreamKind = Literal["facial", "acoustic", "latent"]


@dataclass(frozen=True)
class StreamSpec:
    """One input stream of every person: its name, class and width (features per frame)."""

    name: str
    kind: StreamKind
    width: int


AUTHORS = (
    StreamSpec("va", "facial", 64),
    StreamSpec("au", "facial", 25088),
    StreamSpec("fer", "facial", 1408),
    StreamSpec("mfcc", "acoustic", 26),
    StreamSpec("w2v", "acoustic", 1536),
)
"""The features that the authors extracted from REACT 2024."""

AUTHORS_FRAMES = 750
"""Frames of their clips."""

SIMULATED = (
    StreamSpec("va", "facial", 8),
    StreamSpec("au", "facial", 64),
    StreamSpec("fer", "facial", 16),
    StreamSpec("mfcc", "acoustic", 26),
)
"""The simulator's, the demo's among them."""


@dataclass(frozen=True)
class Clip:
    """One dyad recorded once.

    Attributes:
        key: unique within a dataset, letters, digits, `_` and `-` only.
        people: person ("a", "b") -> stream name -> array (frames, width): float16 inputs and the float32 targets
            `attributes` (frames, 25) and `coefficients` (frames, 58).
        meta: what else is known of the clip and JSON can hold (paths, subjects).
    """

    key: str
    people: dict[str, dict[str, np.ndarray]]
    meta: dict[str, Any] = field(default_factory=dict)
