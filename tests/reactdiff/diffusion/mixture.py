"""Data of which everything is known: Gaussians on a line, their best denoiser, and where the probability flow takes a noise."""

import torch
from torch import Tensor

from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import Predict


class Mixture:
    """Components of equal deviation inside [-1, 1]."""

    def __init__(self, weights: list[float], means: list[float], deviation: float):
        self.weights, self.means = torch.tensor([weights, means], dtype=torch.float64)
        self.deviation = deviation

    def clean(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t], by Bayes' rule; of the shape of x_t."""
        noisy = noisy[..., None]
        spread = alpha**2 * self.deviation**2 + sigma**2
        share = (self.weights.log() - (noisy - alpha * self.means) ** 2 / (2 * spread)).softmax(-1)
        return (share * (self.means + alpha * self.deviation**2 / spread * (noisy - alpha * self.means))).sum(-1)

    def denoiser(self, process: Process) -> Predict:
        """The best denoiser, in the parameterisation of the process."""

        def predict(noisy: Tensor, time: float) -> Tensor:
            alpha, sigma = process.scales(torch.tensor(time), noisy)
            clean = self.clean(noisy, alpha, sigma)
            return process.prediction.target(clean, (noisy - alpha * clean) / sigma, alpha, sigma)

        return predict

    def flow(self, process: Process, noise: Tensor, end: float = 0) -> Tensor:
        """Where the probability flow takes each noise, and the x_0 that the best denoiser sees there, at time `end`.

        On a line the flow keeps the order, so it takes every quantile of x_T to the same quantile of x_end.
        """
        last = process.scales(torch.tensor(len(process.abar) - 1), torch.tensor(0.0, dtype=torch.float64))
        alpha, sigma = process.scales(torch.tensor(end), torch.tensor(0.0, dtype=torch.float64))
        wanted = self._below(noise, *last)
        low, high = torch.full_like(noise, -12), torch.full_like(noise, 12)
        for _ in range(80):
            middle = (low + high) / 2
            under = self._below(middle, alpha, sigma) < wanted
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        return self.clean(low, alpha, sigma)

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the data."""
        mean = float(self.weights @ self.means)
        return mean, float(self.weights @ (self.means - mean) ** 2) + self.deviation**2

    def nearest(self, x: Tensor) -> Tensor:
        """The component whose mean is nearest."""
        return (x[:, None] - self.means).abs().argmin(1)

    def shares(self, x: Tensor) -> Tensor:
        """The share of samples that each component has."""
        return torch.bincount(self.nearest(x), minlength=len(self.means)) / len(x)

    def _below(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """P(x_t < x)."""
        scaled = (x[..., None] - alpha * self.means) / (alpha**2 * self.deviation**2 + sigma**2).sqrt()
        return torch.special.ndtr(scaled) @ self.weights


MIXTURE = Mixture([0.3, 0.5, 0.2], [-0.6, 0.1, 0.7], 0.1)


def quantiles(count: int) -> Tensor:
    """Evenly spaced quantiles of the standard normal, (count,) float64: a sample with no luck in it."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def rms(difference: Tensor) -> float:
    """Root mean square."""
    return float((difference**2).mean().sqrt())
