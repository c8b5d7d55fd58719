"""Noise schedules: how fast the clean latent drowns, as the log signal-to-noise ratio over u in (0, 1].

Log-SNR, log(abar / (1 - abar)), is the axis on which all of them are one kind of thing (Kingma et al., 2021). Step t of T stands at
u = (t + 1) / T. Log-SNR falls everywhere; where nothing of the clean latent is left, it and its derivative are minus infinity.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np


class Schedule(Protocol):
    """What the process asks of a schedule."""

    def log_snr(self, u: np.ndarray) -> np.ndarray:
        """Log(abar / (1 - abar)) at u in (0, 1], float64."""

    def derivative(self, u: np.ndarray) -> np.ndarray:
        """The derivative d log_snr / du, exact, float64; negative."""


class ByShare(ABC):
    """A schedule whose source writes down abar, the share of the clean latent that is left."""

    @abstractmethod
    def abar(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The share at u, and its slope d abar / du."""

    def log_snr(self, u: np.ndarray) -> np.ndarray:
        """Log(abar / (1 - abar)) at u in (0, 1], float64."""
        abar = np.maximum(self.abar(u)[0], 0)
        with np.errstate(divide="ignore"):
            return np.log(abar) - np.log1p(-abar)

    def derivative(self, u: np.ndarray) -> np.ndarray:
        """The derivative d log_snr / du, float64."""
        abar, slope = self.abar(u)
        with np.errstate(divide="ignore"):
            return slope / (np.maximum(abar, 0) * (1 - abar))


class Cosine(ByShare):
    """The squared cosine, with an offset of 0.008 (Nichol and Dhariwal, 2021, eq. 17)."""

    def abar(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f(u) / f(0) with f = cos^2 of an angle that ends at a right one."""
        rate, start = math.pi / 2 / 1.008, math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        angle = (u + 0.008) * rate
        return np.cos(angle) ** 2 / start, -rate * np.sin(2 * angle) / start


class Linear:
    """Linear betas (Ho et al., 2020) in their continuous form, beta(u) = 0.1 + 19.9 u (Song et al., 2021, VP SDE): any T ends in noise."""

    def log_snr(self, u: np.ndarray) -> np.ndarray:
        """From abar = exp(-integral of beta)."""
        return -np.log(np.expm1(0.1 * u + 9.95 * u**2))

    def derivative(self, u: np.ndarray) -> np.ndarray:
        """-beta / (1 - abar)."""
        return (0.1 + 19.9 * u) / np.expm1(-0.1 * u - 9.95 * u**2)


class Sqrt(ByShare):
    """Noise comes at once: abar = 1 - sqrt(u + 1e-4) (Li et al., 2022, Diffusion-LM)."""

    def abar(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nothing is left from u = 0.9999 on."""
        root = np.sqrt(u + 1e-4)
        return 1 - root, -0.5 / root


class Sigmoid(ByShare):
    """A sigmoid from -3 to 3 at temperature 1, scaled to fall from 1 to 0 (Jabri et al., 2023; Chen, 2023)."""

    def abar(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sigmoid(3) - sigmoid(6 u - 3)) / (sigmoid(3) - sigmoid(-3)), where 2 sigmoid(x) - 1 = tanh(x / 2)."""
        rise, span = np.tanh((6 * u - 3) / 2), 2 * math.tanh(3 / 2)
        return (math.tanh(3 / 2) - rise) / span, -3 * (1 - rise**2) / span


class Karras:
    """EDM's levels sigma, rho 7, 0.002 to 80 (Karras et al., 2022, eq. 5), taken as noise over signal: abar = 1 / (1 + sigma^2)."""

    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)

    def log_snr(self, u: np.ndarray) -> np.ndarray:
        """-2 log sigma."""
        return -14 * np.log(self.low + u * (self.high - self.low))

    def derivative(self, u: np.ndarray) -> np.ndarray:
        """d(-2 log sigma) / du."""
        return -14 * (self.high - self.low) / (self.low + u * (self.high - self.low))


class Flow:
    """The straight line of flow matching (Lipman et al., 2023): (1 - u) x_0 + u noise, scaled here to unit variance."""

    def log_snr(self, u: np.ndarray) -> np.ndarray:
        """2 log((1 - u) / u)."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log1p(-u) - np.log(u))

    def derivative(self, u: np.ndarray) -> np.ndarray:
        """-2 / (u (1 - u))."""
        with np.errstate(divide="ignore"):
            return -2 / (u * (1 - u))


SCHEDULES: dict[str, Schedule] = {
    "cosine": Cosine(),
    "linear": Linear(),
    "sqrt": Sqrt(),
    "sigmoid": Sigmoid(),
    "karras": Karras(),
    "flow": Flow(),
}
