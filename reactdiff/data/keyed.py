"""Keyed randomness: every random number is a pure function of what it is for.

A generator is made from its key and thrown away; none is saved, restored or advanced across calls.
"""

import hashlib

import numpy as np

Part = int | str


def seed_of(*parts: Part) -> int:
    """A 128-bit seed from any parts, the same on every machine; `("a", "b")` and `("ab",)` differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(*parts: Part) -> np.random.Generator:
    """A Philox generator for this key (Salmon et al., 2011), independent of every other key's."""
    return np.random.Generator(np.random.Philox(key=seed_of(*parts)))


def normal(shape: tuple[int, ...], *parts: Part) -> np.ndarray:
    """Standard normal float32 numbers of this shape for this key."""
    return generator(*parts).standard_normal(shape, dtype=np.float32)
