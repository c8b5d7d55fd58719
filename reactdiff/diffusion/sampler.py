"""From noise to a clean latent."""

from collections.abc import Callable

import torch
from torch import Tensor

from reactdiff.diffusion.prediction import noise_of
from reactdiff.diffusion.process import Process

Predict = Callable[[Tensor, Tensor], Tensor]


def sampling_times(steps: int, sampling_steps: int) -> list[int]:
    """The times a sampler visits, evenly spaced and from the noisiest, steps - 1, down.

    Trailing spacing (Lin et al., 2024, table 2): however few they are, they begin in pure noise.
    """
    return [steps * left // sampling_steps - 1 for left in range(sampling_steps, 0, -1)]


def ddim(process: Process, predict: Predict, noise: Tensor, sampling_steps: int) -> Tensor:
    """The deterministic sampler (Song et al., 2021, eq. 12 with sigma = 0), each x_0 clamped to [-1, 1].

    Args:
        process: the process the denoiser was trained on.
        predict: the denoiser, (x_t (batch, ...), times (batch,)) -> prediction (batch, ...).
        noise: x at the noisiest time, (batch, ...).
        sampling_steps: calls of the denoiser, at most the steps of the process.

    Returns:
        The last x_0, (batch, ...).
    """
    noisy, clean, implied = noise, noise, noise
    for step, time in enumerate(sampling_times(len(process.abar), sampling_steps)):
        times = torch.full((len(noise),), time, device=noise.device)
        alpha, sigma = process.scales(times, noise)
        if step:
            noisy = alpha * clean + sigma * implied
        clean = process.prediction.clean(noisy, predict(noisy, times), alpha, sigma).clamp(-1, 1)
        implied = noise_of(noisy, clean, alpha, sigma)
    return clean
