"""The learning rate as a pure function of progress."""

from math import cos, pi

from reactdiff.config import Optim

FLOOR = 0.01
"""What is left of the peak after the decay."""


def learning_rate(optim: Optim, stage: str, progress: int) -> float:
    """The rate of the step that starts at this progress: linear warm-up, then constant or a cosine decay to the floor.

    Args:
        optim: the optimiser's branch.
        stage: "autoencoder" or "diffusion".
        progress: items consumed so far.
    """
    peak, warmup, decay = optim.lr[stage], optim.warmup[stage], optim.decay[stage]
    if progress < warmup:
        return peak * (progress + optim.batch[stage]) / (warmup + optim.batch[stage])
    if not decay:
        return peak
    through = min(1.0, (progress - warmup) / (decay - warmup))
    return peak * (FLOOR + (1 - FLOOR) * (1 + cos(pi * through)) / 2)
