"""The forward process, and what the denoiser is asked about it."""

import torch
from torch import Tensor

from reactdiff import config
from reactdiff.diffusion.prediction import PREDICTIONS
from reactdiff.diffusion.schedule import schedule


class Process:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (Ho et al., 2020, eq. 4) for t = 0 .. steps - 1.

    Attributes:
        abar: (steps,) float64, of the configured schedule.
        prediction: the configured parameterisation.
    """

    def __init__(self, diffusion: config.Diffusion):
        self.abar = torch.from_numpy(schedule(diffusion).abar)
        self.prediction = PREDICTIONS[diffusion.prediction]

    def scales(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha and sigma at `times` (batch,), in the dtype of `like` (batch, ...) and shaped to broadcast with it."""
        abar = self.abar.to(times.device)[times].reshape(-1, *[1] * (like.dim() - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def q_sample(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, of shape (batch, ...) for times (batch,)."""
        alpha, sigma = self.scales(times, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict at x_t = q_sample(clean, noise, times)."""
        return self.prediction.target(clean, noise, *self.scales(times, clean))
