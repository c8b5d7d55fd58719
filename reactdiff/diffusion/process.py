"""The forward process, what the denoiser is asked about it, and how much each time counts."""

import numpy as np
import torch
from torch import Tensor

from reactdiff import config
from reactdiff.diffusion.prediction import PREDICTIONS, Prediction
from reactdiff.diffusion.schedule import SCHEDULES

LEAST_LEFT = 0.001
"""A step leaves at least this share of abar, so that a beta is at most 0.999 (Nichol and Dhariwal, 2021) and abar never 0."""
MIN_SNR = 5.0
"""Gamma of Hang et al. (2023)."""


class Process:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (Ho et al., 2020, eq. 4) for t = 0 .. steps - 1.

    Step t stands at u = (t + 1) / steps of its schedule. A time may lie between two steps; log-SNR is then linear between theirs.
    Tables are plain float64 tensors on the CPU, whatever the device of the module that holds the process; another device gets a copy once.

    Attributes:
        abar: (steps,) float64, of the configured schedule; falls strictly and stays above 0.
        prediction: the configured parameterisation.
    """

    def __init__(self, diffusion: config.Diffusion):
        schedule = SCHEDULES[diffusion.schedule]
        u = np.arange(1, diffusion.steps + 1) / diffusion.steps
        log_snr, raised = _floored(schedule.log_snr(u))
        # Where the floor binds, the process is the line between two steps, and so is its slope; a single step has any slope but 0.
        slope = np.where(raised, np.diff(log_snr, prepend=0) * diffusion.steps, schedule.derivative(u))
        self.prediction = PREDICTIONS[diffusion.prediction]
        self.abar = torch.from_numpy(_share(log_snr))
        self._log_snr = torch.from_numpy(log_snr)
        self._weight = torch.from_numpy(_weights(diffusion.weighting, self.prediction, np.exp(log_snr), slope).astype(np.float32))
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def log_snr(self, times: Tensor) -> Tensor:
        """Log(abar / (1 - abar)) at whole or fractional times 0 .. steps - 1 of any shape, float64 of the same shape."""
        return _between(self._on(times.device)[0], times.double())

    def nearest(self, log_snr: float) -> tuple[int, float]:
        """The step whose log-SNR is nearest to this one, and its log-SNR."""
        step = int((self._log_snr - log_snr).abs().argmin())
        return step, float(self._log_snr[step])

    def times(self, log_snr: np.ndarray) -> np.ndarray:
        """The inverse of `log_snr`: the times, mostly fractional, at which the log-SNR is this; beyond the process, its ends."""
        return np.interp(-log_snr, -self._log_snr.numpy(), np.arange(len(self._log_snr)))

    def scales(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The alpha = sqrt(abar) and sigma = sqrt(1 - abar) at whole or fractional `times`, computed in float64.

        Args:
            times: of any shape, the leading dimensions of `like`; () for one time for all.
            like: what they will scale, (*times.shape, ...).

        Returns:
            Both in the dtype of `like`, of shape (*times.shape, 1, .., 1) with as many dimensions as `like`.
        """
        log_snr = self.log_snr(times).reshape(times.shape + (1,) * (like.dim() - times.dim()))
        return log_snr.sigmoid().sqrt().to(like.dtype), (-log_snr).sigmoid().sqrt().to(like.dtype)

    def q_sample(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, of the shape of `clean`, (*times.shape, ...)."""
        alpha, sigma = self.scales(times, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict at x_t = q_sample(clean, noise, times)."""
        return self.prediction.target(clean, noise, *self.scales(times, clean))

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """The x_0 that a prediction at x_t = `noisy` implies."""
        return self.prediction.clean(noisy, prediction, *self.scales(times, noisy))

    def weight(self, times: Tensor) -> Tensor:
        """How much the loss at whole or fractional `times` counts, float32 of the same shape; the mean over all steps is 1."""
        return _between(self._on(times.device)[1], times) if times.is_floating_point() else self._on(times.device)[1][times]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The log-SNR and the weight of each step, on a device; to copy them in each forward pass would wait for it each time."""
        if device not in self._copies:
            self._copies[device] = self._log_snr.to(device), self._weight.to(device)
        return self._copies[device]


def _between(table: Tensor, times: Tensor) -> Tensor:
    """Values of a table at fractional places, linear between whole ones."""
    below = times.floor().long()
    above = (below + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[below], table[above], times - below)


def _floored(log_snr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log-SNR with no step that leaves less than LEAST_LEFT of abar, and where it was raised."""
    abar, left = _share(log_snr), 1.0
    for step, share in enumerate(abar):
        abar[step] = left = max(share, LEAST_LEFT * left)
    raised = abar > _share(log_snr)
    return np.where(raised, np.log(abar) - np.log1p(-abar), log_snr), raised


def _share(log_snr: np.ndarray) -> np.ndarray:
    """The abar of a log-SNR."""
    return 1 / (1 + np.exp(-log_snr))


def _weights(weighting: str, prediction: Prediction, snr: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The loss weight of each step for the squared error of a prediction, with mean 1; `slope` is d log_snr / du."""
    for_clean = {"min-snr": np.minimum(snr, MIN_SNR), "elbo": -slope * snr}  # elbo: Kingma et al. (2021), eq. 17
    weights = np.ones_like(snr) if weighting == "uniform" else for_clean[weighting] * prediction.clean_error(snr)
    return weights / weights.mean()
