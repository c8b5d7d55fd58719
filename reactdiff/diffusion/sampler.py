"""From noise to a clean latent.

At each time it visits, a sampler asks the denoiser once and clamps the x_0 that follows to what the data hold. Samplers differ in how they
move on to the next time. With h half the rise of log-SNR from one to the other, all three are short.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reactdiff.diffusion.prediction import noise_of
from reactdiff.diffusion.process import Process

Predict = Callable[[Tensor, float], Tensor]
"""The denoiser: x_t and the time, whole or fractional -> its prediction, in the parameterisation of the process."""
Noise = Callable[[int], Tensor]
"""Standard normal numbers by the number of the draw: 0 is where a sample starts, i goes into step i."""
Limits = tuple[float, float] | tuple[Tensor, Tensor]
"""Least and largest x_0, of all features or of each."""
UNIT: Limits = (-1.0, 1.0)


class Sampler(Protocol):
    """A way from noise to x_0."""

    def __call__(self, process: Process, predict: Predict, noise: Noise, sampling_steps: int, limits: Limits = UNIT) -> Tensor:
        """A sample.

        Args:
            process: the process the denoiser was trained on.
            predict: the denoiser.
            noise: draws of one shape, that of the sample.
            sampling_steps: calls of the denoiser.
            limits: least and largest x_0, to which every estimate of it is clamped.

        Returns:
            The last x_0, of the shape of the noise.
        """


class Estimate(NamedTuple):
    """What is known after a call of the denoiser: x_0, the noise that leads from it to x_t, and half the log-SNR there."""

    clean: Tensor
    noise: Tensor
    half: float


class Ahead(NamedTuple):
    """Where a step leads: alpha, sigma and half the log-SNR at the next time; and the number of the step."""

    alpha: Tensor
    sigma: Tensor
    half: float
    step: int


def sampling_times(steps: int, sampling_steps: int) -> list[float]:
    """The times a sampler visits, evenly spaced and from the noisiest, steps - 1, down.

    Trailing spacing (Lin et al., 2024, table 2): however few they are, they begin in pure noise. Up to `steps` they are whole numbers;
    more of them divide the way from steps - 1 to 0 evenly. A process of one step has one time only.
    """
    if sampling_steps <= steps:
        return [steps * left // sampling_steps - 1 for left in range(sampling_steps, 0, -1)]
    if steps == 1:
        return [0]
    return [(steps - 1) * left / (sampling_steps - 1) for left in range(sampling_steps - 1, -1, -1)]


def ddim(process: Process, predict: Predict, noise: Noise, sampling_steps: int, limits: Limits = UNIT) -> Tensor:
    """The deterministic sampler (Song et al., 2021a, eq. 12 with sigma = 0): the same x_0 and the same noise, less of it."""

    def move(now: Estimate, before: Estimate | None, ahead: Ahead) -> Tensor:
        return ahead.alpha * now.clean + ahead.sigma * now.noise

    return _walk(process, predict, noise, sampling_steps, limits, move)


def ddpm(process: Process, predict: Predict, noise: Noise, sampling_steps: int, limits: Limits = UNIT) -> Tensor:
    """The ancestral sampler (Ho et al., 2020, eq. 7): each step draws from q(x_s | x_t, x_0).

    In terms of the noise in x_t, e^-h of it stays and fresh noise makes up the rest of the variance.
    """

    def move(now: Estimate, before: Estimate | None, ahead: Ahead) -> Tensor:
        kept = math.exp(now.half - ahead.half)
        return ahead.alpha * now.clean + ahead.sigma * (kept * now.noise + math.sqrt(1 - kept**2) * noise(ahead.step))

    return _walk(process, predict, noise, sampling_steps, limits, move)


def dpm_solver(process: Process, predict: Predict, noise: Noise, sampling_steps: int, limits: Limits = UNIT) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022b, algorithm 2), deterministic and of second order.

    DDIM takes x_0 for constant over a step. This one takes it to change as it did over the step before, as a function of half the log-SNR.
    """

    def move(now: Estimate, before: Estimate | None, ahead: Ahead) -> Tensor:
        clean = now.clean
        if before is not None:
            h, last = ahead.half - now.half, now.half - before.half
            clean = clean + (1 - math.exp(-h)) * h / (2 * last) * (now.clean - before.clean)
        return ahead.alpha * clean + ahead.sigma * now.noise

    return _walk(process, predict, noise, sampling_steps, limits, move)


def _walk(
    process: Process,
    predict: Predict,
    noise: Noise,
    sampling_steps: int,
    limits: Limits,
    move: Callable[[Estimate, Estimate | None, Ahead], Tensor],
) -> Tensor:
    """Visits the sampling times: `move` leads from what is known, now and one call before, to the next x_t."""
    noisy = noise(0)
    times = sampling_times(len(process.abar), sampling_steps)
    visited = torch.tensor(times, dtype=torch.float64)
    halves = (process.log_snr(visited) / 2).tolist()
    scales = zip(*process.scales(visited.to(noisy.device), noisy), strict=True)
    now: Estimate | None = None
    before: Estimate | None = None
    for step, (time, half, (alpha, sigma)) in enumerate(zip(times, halves, scales, strict=True)):
        if now is not None:
            noisy = move(now, before, Ahead(alpha, sigma, half, step))
        clean = process.prediction.clean(noisy, predict(noisy, time), alpha, sigma).clamp(*limits)
        before, now = now, Estimate(clean, noise_of(noisy, clean, alpha, sigma), half)
    return clean


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver}
