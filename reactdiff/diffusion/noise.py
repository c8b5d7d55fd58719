"""Noise and times, keyed by what they are for: the same on any device and any number of ranks."""

import numpy as np

from reactdiff.clip import WINDOW
from reactdiff.data.keyed import generator, normal


def training_noise(seed: int, position: int, windows: int, latent: int, what: str = "training noise") -> np.ndarray:
    """The noise of the item at a place in the order, (windows, 50, latent) float32, standard normal; `what` it is for tells draws apart."""
    return np.stack([normal((WINDOW, latent), seed, what, position, window) for window in range(windows)])


def training_times(seed: int, position: int, chunks: int, steps: int) -> np.ndarray:
    """The diffusion time of each chunk of the item at a place in the order, (chunks,) int64, uniform over 0 .. steps - 1."""
    return np.array([generator(seed, "training time", position, chunk).integers(steps) for chunk in range(chunks)], dtype=np.int64)


def training_levels(seed: int, position: int, chunks: int, mean: float, deviation: float) -> np.ndarray:
    """The log-SNR of each chunk of the item at a place in the order, (chunks,) float64: -2 ln s with ln s normal (Karras et al., 2022)."""
    drawn = [generator(seed, "training level", position, chunk).standard_normal() for chunk in range(chunks)]
    return -2 * (mean + deviation * np.array(drawn))


def training_chance(seed: int, position: int, what: str, count: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1) of the item at a place in the order, (count,) float64, for what is a matter of chance."""
    return generator(seed, what, position).random(count)


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
