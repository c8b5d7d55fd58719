"""Noise and times, keyed by what they are for: the same on any device and any number of ranks."""

import numpy as np

from reactdiff.clip import WINDOW
from reactdiff.data.keyed import generator, normal


def training_noise(seed: int, position: int, windows: int, latent: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The noise and diffusion times of the item at a place in the order.

    Returns:
        noise (windows, 50, latent) float32, standard normal; times (windows,) int64, uniform over 0 .. steps - 1.
    """
    noise = np.stack([normal((WINDOW, latent), seed, "training noise", position, window) for window in range(windows)])
    times = [generator(seed, "training time", position, window).integers(steps) for window in range(windows)]
    return noise, np.array(times, dtype=np.int64)


def training_hearing(seed: int, position: int, windows: int, dropout: float) -> np.ndarray:
    """Which windows of the item at a place in the order hear their speaker, (windows,) float32: 1, or 0 with probability `dropout`."""
    draws = [generator(seed, "training hearing", position, window).random() for window in range(windows)]
    return (np.array(draws) >= dropout).astype(np.float32)


def generation_noise(seed: int, key: str, direction: int, k: int, windows: int, latent: int, step: int = 0) -> np.ndarray:
    """The noise of reaction number k of a clip and direction, (windows, 50, latent) float32, standard normal.

    Step 0 is the noise it starts from; a sampler that adds noise on its way asks for later ones.
    """
    return np.stack([window_noise(seed, key, direction, k, window, latent, step) for window in range(windows)])


def window_noise(seed: int, key: str, direction: int, k: int, window: int, latent: int, step: int = 0) -> np.ndarray:
    """That of one window, (50, latent)."""
    later = (step,) if step else ()
    return normal((WINDOW, latent), seed, "generation noise", key, direction, k, window, *later)
