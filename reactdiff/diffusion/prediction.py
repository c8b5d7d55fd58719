"""What a denoiser may predict, and the clean latent that each prediction implies.

All of them speak of x_t = alpha x_0 + sigma noise, with alpha = sqrt(abar_t) and sigma = sqrt(1 - abar_t), which broadcast.
"""

from typing import Protocol

import numpy as np
from torch import Tensor


class Prediction(Protocol):
    """A parameterisation: the regression target, the way back from a prediction to x_0, and what a squared error is worth."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the denoiser should have said."""

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The x_0 that a prediction implies."""

    def clean_error(self, snr: np.ndarray) -> np.ndarray:
        """The squared error of x_0 that a squared error of 1 means; turns a loss weight for x_0 into one for this prediction."""


class Epsilon:
    """The noise (Ho et al., 2020, eq. 14)."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_0 = (x_t - sigma epsilon) / alpha."""
        return (noisy - sigma * prediction) / alpha

    def clean_error(self, snr: np.ndarray) -> np.ndarray:
        """sigma^2 / alpha^2."""
        return 1 / snr


class Clean:
    """The clean latent x_0."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent itself."""
        return clean

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction

    def clean_error(self, snr: np.ndarray) -> np.ndarray:
        """1."""
        return np.ones_like(snr)


class Velocity:
    """v = alpha noise - sigma x_0 (Salimans and Ho, 2022, appendix D): the noise where all is clean, minus x_0 where all is noise.

    On data of unit variance it is the network's answer, but for its sign, under EDM's whole preconditioning (Karras et al., 2022, table 1):
    c_skip = 1 / (1 + s^2) of x_0 + s noise with s = sigma / alpha is alpha of x_t, and c_out = s / sqrt(1 + s^2) is sigma.
    """

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """V of the clean latent and the noise."""
        return alpha * noise - sigma * clean

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_0 = alpha x_t - sigma v."""
        return alpha * noisy - sigma * prediction

    def clean_error(self, snr: np.ndarray) -> np.ndarray:
        """sigma^2."""
        return 1 / (snr + 1)


class Straight:
    """The velocity noise - x_0 of the straight line between them (flow matching; Lipman et al., 2023)."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The difference."""
        return noise - clean

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_0 = (x_t - sigma velocity) / (alpha + sigma)."""
        return (noisy - sigma * prediction) / (alpha + sigma)

    def clean_error(self, snr: np.ndarray) -> np.ndarray:
        """sigma^2 / (alpha + sigma)^2."""
        return 1 / (1 + np.sqrt(snr)) ** 2


def noise_of(noisy: Tensor, clean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that leads from x_0 to x_t: (x_t - alpha x_0) / sigma."""
    return (noisy - alpha * clean) / sigma


PREDICTIONS: dict[str, Prediction] = {"epsilon": Epsilon(), "x0": Clean(), "v": Velocity(), "flow": Straight()}
