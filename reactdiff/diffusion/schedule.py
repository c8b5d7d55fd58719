"""Noise schedules: how much of the clean latent is left at each step.

A schedule has `abar`, (steps,) float64: abar_t is the product of 1 - beta_s for s <= t. Everything else follows from it.
"""

import math
from typing import Protocol

import numpy as np

from reactdiff import config

LARGEST_BETA = 0.999


class Schedule(Protocol):
    """What the process asks of a schedule."""

    abar: np.ndarray

    def __init__(self, steps: int): ...


class Cosine:
    """The squared-cosine schedule (Nichol and Dhariwal, 2021, eq. 17)."""

    def __init__(self, steps: int):
        def left(step: int) -> float:
            return math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - left(step + 1) / left(step), LARGEST_BETA) for step in range(steps)]
        self.abar = np.cumprod(1 - np.array(betas))


class Linear:
    """Betas from 1e-4 to 0.02 (Ho et al., 2020, section 4), scaled by 1000 / steps so that twenty steps end in noise as a thousand do."""

    def __init__(self, steps: int):
        betas = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
        self.abar = np.cumprod(1 - betas.clip(max=LARGEST_BETA))


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "linear": Linear}


def schedule(diffusion: config.Diffusion) -> Schedule:
    """The schedule that `diffusion.schedule` names, with `diffusion.steps` steps."""
    return SCHEDULES[diffusion.schedule](diffusion.steps)
