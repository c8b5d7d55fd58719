"""On Gaussian data the best denoiser is known, and so is where the sampler should end."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from reactdiff.config import Diffusion
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import ddim, sampling_times

MEAN, DEVIATION = 0.2, 0.1


class Gaussian:
    """The best denoiser for x_0 ~ N(MEAN, DEVIATION^2), by Bayes' rule, in the parameterisation of its process."""

    def __init__(self, process: Process, prediction: str):
        self.process, self.prediction = process, prediction

    def __call__(self, noisy: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = self.process.scales(times, noisy)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = MEAN + gain * (noisy - alpha * MEAN)
        return clean if self.prediction == "x0" else (noisy - alpha * clean) / sigma


def error(prediction: str, sampling_steps: int) -> float:
    """Largest distance from where the probability flow of the whole process takes each noise: its quantile of the data."""
    process = Process(Diffusion(steps=1000, sampling_steps=sampling_steps, prediction=prediction))
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    sample = ddim(process, Gaussian(process, prediction), noise, sampling_steps)
    return float((sample - (MEAN + DEVIATION * noise)).abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_ddim_converges_to_the_quantiles_of_a_gaussian(prediction: str) -> None:
    errors = [error(prediction, steps) for steps in (10, 40, 160, 640)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.05 * DEVIATION


def test_both_predictions_lead_to_the_same_sample() -> None:
    samples = []
    for prediction in ("epsilon", "x0"):
        process = Process(Diffusion(prediction=prediction))
        samples.append(ddim(process, Gaussian(process, prediction), torch.linspace(-2, 2, 9, dtype=torch.float64), 20))
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_a_prediction_gives_back_the_clean_latent_it_was_made_from(prediction: str) -> None:
    process = Process(Diffusion(prediction=prediction))
    clean, noise = torch.randn(2, 20, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(20)
    noisy = process.q_sample(clean, noise, times)
    scales = process.scales(times, clean)
    torch.testing.assert_close(process.prediction.clean(noisy, process.target(clean, noise, times), *scales), clean)


def test_noisy_latents_keep_the_variance_of_unit_latents() -> None:
    process = Process(Diffusion())
    alpha, sigma = process.scales(torch.arange(20), torch.empty(20, 1, dtype=torch.float64))
    assert (alpha**2 + sigma**2).flatten().tolist() == pytest.approx([1] * 20)
    assert float(alpha[7]) == pytest.approx(math.sqrt(0.647478), abs=1e-6)


def test_a_prediction_outside_the_range_is_clamped() -> None:
    process = Process(Diffusion(prediction="x0"))
    assert ddim(process, lambda x, times: torch.full_like(x, 7), torch.zeros(2, 3), 20).tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("steps, sampling_steps", [(20, 20), (20, 1), (20, 7), (20, 19), (1000, 50), (1, 1)])
def test_any_number_of_steps_begins_in_noise_and_visits_every_time_at_most_once(steps: int, sampling_steps: int) -> None:
    times = sampling_times(steps, sampling_steps)
    assert len(set(times)) == len(times) == sampling_steps
    assert times[0] == steps - 1 and times == sorted(times, reverse=True) and times[-1] >= 0
