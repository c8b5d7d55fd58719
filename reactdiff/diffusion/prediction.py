"""What a denoiser may predict, and the clean latent that each prediction implies.

All of them speak of x_t = alpha x_0 + sigma noise, with alpha = sqrt(abar_t) and sigma = sqrt(1 - abar_t), which broadcast.
"""

from typing import Protocol

from torch import Tensor


class Prediction(Protocol):
    """A parameterisation: the regression target, and the way back from a prediction to x_0."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the denoiser should have said."""

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The x_0 that a prediction implies."""


class Epsilon:
    """The noise (Ho et al., 2020, eq. 14)."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_0 = (x_t - sigma epsilon) / alpha."""
        return (noisy - sigma * prediction) / alpha


class Clean:
    """The clean latent x_0."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent itself."""
        return clean

    def clean(self, noisy: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The prediction itself."""
        return prediction


def noise_of(noisy: Tensor, clean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that leads from x_0 to x_t: (x_t - alpha x_0) / sigma."""
    return (noisy - alpha * clean) / sigma


PREDICTIONS: dict[str, Prediction] = {"epsilon": Epsilon(), "x0": Clean()}
