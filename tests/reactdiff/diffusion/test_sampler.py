"""On data of which everything is known, so is where a sampler should end."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from reactdiff.config import Diffusion
from reactdiff.diffusion.prediction import PREDICTIONS
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import SAMPLERS, ddim, ddpm, dpm_solver, sampling_times
from reactdiff.diffusion.schedule import SCHEDULES
from tests.reactdiff.diffusion.mixture import MIXTURE, Mixture, quantiles, rms

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def draws(start: Tensor, step: int) -> Tensor:
    """Noise that begins at `start`."""
    return torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(step)) if step else start


def sample(sampler: str, process: Process, sampling_steps: int, start: Tensor, data: Mixture = MIXTURE) -> Tensor:
    return SAMPLERS[sampler](process, data.denoiser(process), lambda step: draws(start, step), sampling_steps)


def error(sampler: str, process: Process, sampling_steps: int, data: Mixture = MIXTURE) -> float:
    """How far samples are from where the probability flow takes their noises (for ddpm: from its quantiles)."""
    noise = quantiles(500 if sampler != "ddpm" else 4000)
    found, wanted = sample(sampler, process, sampling_steps, noise, data), data.flow(process, noise)
    return rms((found.sort().values if sampler == "ddpm" else found) - wanted)


@pytest.mark.parametrize("sampler, near", [("ddim", 0.02), ("ddpm", 0.035), ("dpm++", 0.002)])
@each_prediction
@each_schedule
def test_every_sampler_ends_in_the_data_as_the_process_shows_them(sampler: str, prediction: str, schedule: str, near: float) -> None:
    process = Process(Diffusion(schedule=schedule, prediction=prediction))
    noise = quantiles(1500)
    found, wanted = sample(sampler, process, 100, noise), MIXTURE.flow(process, noise)
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=near)
    assert float(found.std()) == pytest.approx(float(wanted.std()), abs=near)
    assert MIXTURE.shares(found).tolist() == pytest.approx(MIXTURE.shares(wanted).tolist(), abs=near)


@pytest.mark.parametrize("sampler, near", [("ddim", 0.02), ("ddpm", 0.02), ("dpm++", 0.005)])
@pytest.mark.parametrize("schedule, steps", [("karras", 20), ("cosine", 1000)])
def test_every_sampler_ends_in_the_data_where_the_first_step_is_nearly_clean(sampler: str, schedule: str, steps: int, near: float) -> None:
    process = Process(Diffusion(schedule=schedule, steps=steps))
    found = sample(sampler, process, 200, quantiles(6000))
    mean, variance = MIXTURE.moments()
    assert float(found.mean()) == pytest.approx(mean, abs=near) and float(found.std()) == pytest.approx(math.sqrt(variance), abs=near)
    assert MIXTURE.shares(found).tolist() == pytest.approx(MIXTURE.weights.tolist(), abs=near)
    for component in range(3):
        assert float(found[MIXTURE.nearest(found) == component].std()) == pytest.approx(MIXTURE.deviation, rel=0.15)


@pytest.mark.parametrize("sampler, falls", [("ddim", 0.6), ("dpm++", 0.42)])
@each_schedule
def test_twice_the_steps_halve_the_error_of_a_first_order_sampler_and_better_that_of_a_second(
    sampler: str, falls: float, schedule: str
) -> None:
    process = Process(Diffusion(schedule=schedule))
    errors = [error(sampler, process, steps) for steps in (20, 40, 80, 160)]
    assert all(later < falls * earlier for earlier, later in itertools.pairwise(errors)), errors


@each_schedule
def test_more_steps_bring_the_ancestral_sampler_nearer_to_the_data(schedule: str) -> None:
    process = Process(Diffusion(schedule=schedule))
    few, some, many = (error("ddpm", process, steps) for steps in (5, 20, 100))
    assert many < 0.6 * some and some < 0.6 * few


def test_dpm_solver_in_10_steps_is_nearer_than_ddim_in_20() -> None:
    smooth = Mixture([1], [0.1], 0.2)
    karras = Process(Diffusion(schedule="karras"))
    assert error("dpm++", karras, 10, smooth) < 0.6 * error("ddim", karras, 20, smooth)
    for schedule in SCHEDULES:
        process = Process(Diffusion(schedule=schedule))
        assert error("dpm++", process, 20, smooth) < 0.7 * error("ddim", process, 40, smooth)


@pytest.mark.parametrize("sampler", SAMPLERS)
@each_schedule
@pytest.mark.parametrize("sampling_steps", [1, 7, 20, 50])
def test_all_predictions_lead_to_the_same_sample(sampler: str, schedule: str, sampling_steps: int) -> None:
    noise = quantiles(9)
    found = {
        name: sample(sampler, Process(Diffusion(schedule=schedule, prediction=name)), sampling_steps, noise) for name in PREDICTIONS
    }
    for one in found.values():
        torch.testing.assert_close(one, found["x0"])


class Recorder:
    """A denoiser that predicts x_0 = 0.3, then 0.1, 0.05, .., and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, float]] = []

    def __call__(self, noisy: Tensor, time: float) -> Tensor:
        self.seen.append((noisy, time))
        return torch.full_like(noisy, self.answer(len(self.seen) - 1))

    @staticmethod
    def answer(call: int) -> float:
        return 0.3 if call == 0 else 0.2 / 2**call


@pytest.mark.parametrize("sampling_steps", [20, 6])
def test_ddpm_draws_from_the_posterior(sampling_steps: int) -> None:
    process, denoiser = Process(Diffusion(prediction="x0")), Recorder()
    numbers = {step: torch.tensor([0.7, -0.2, 0.1 * step], dtype=torch.float64) for step in range(20)}
    ddpm(process, denoiser, numbers.__getitem__, sampling_steps)
    for step, ((before, t), (after, s)) in enumerate(itertools.pairwise(denoiser.seen)):
        abar_t, abar_s = (float(process.abar[int(time)]) for time in (t, s))
        beta = 1 - abar_t / abar_s
        mean = math.sqrt(abar_s) * beta / (1 - abar_t) * denoiser.answer(step) + math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t) * before
        variance = (1 - abar_s) / (1 - abar_t) * beta
        torch.testing.assert_close(after, mean + math.sqrt(variance) * numbers[step + 1])


def test_dpm_solver_is_the_published_multistep_rule() -> None:
    process, denoiser = Process(Diffusion(prediction="x0")), Recorder()
    dpm_solver(process, denoiser, lambda step: torch.tensor([0.7, -0.2], dtype=torch.float64), 20)
    half = process.log_snr(torch.arange(20)) / 2
    for step, ((before, t), (after, s)) in enumerate(itertools.pairwise(denoiser.seen)):
        (alpha, sigma), (_, sigma_t) = (process.scales(torch.tensor(time), before) for time in (s, t))
        h, data = half[int(s)] - half[int(t)], denoiser.answer(step)
        if step:
            r = (half[int(t)] - half[int(t) + 1]) / h
            data = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * denoiser.answer(step - 1)
        torch.testing.assert_close(after, sigma / sigma_t * before - alpha * torch.expm1(-h) * data)


@pytest.mark.parametrize("sampler, asked", [("ddim", [0]), ("ddpm", list(range(12))), ("dpm++", [0])])
def test_only_the_ancestral_sampler_asks_for_noise_on_its_way(sampler: str, asked: list[int]) -> None:
    draws: list[int] = []

    def noise(step: int) -> Tensor:
        draws.append(step)
        return torch.zeros(2, 3)

    SAMPLERS[sampler](Process(Diffusion()), Recorder(), noise, 12)
    assert draws == asked


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sampling_steps", [1, 20, 33])
def test_a_sample_is_the_last_x0_clamped_and_of_the_kind_of_the_noise(sampler: str, sampling_steps: int) -> None:
    process, noise = Process(Diffusion(prediction="x0")), torch.zeros(2, 3)
    found = SAMPLERS[sampler](process, lambda x, time: torch.full_like(x, 7), lambda step: noise, sampling_steps)
    assert found.dtype == torch.float32 and found.tolist() == [[1] * 3] * 2


def test_clamping_keeps_what_would_leave_the_range() -> None:
    """Data that reach beyond [-1, 1] lose their tails, however many steps are taken; data inside lose nothing."""
    process = Process(Diffusion(schedule="karras"))
    outside, inside = (error("dpm++", process, 320, Mixture([1], [0.2], deviation)) for deviation in (0.3, 0.15))
    assert outside > 0.003 and inside < 0.0002


def test_ddim_keeps_the_clamp_and_the_table_of_the_authors() -> None:
    """Written out as in their sampler, in float32 and to the bit."""
    process = Process(Diffusion())
    noise = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0))
    x, abar = noise, torch.cat([torch.ones(1, dtype=torch.float64), process.abar])
    for time in range(19, -1, -1):
        root, rest = (scale.reshape(1).float() for scale in (abar[time + 1].sqrt(), (1 - abar[time + 1]).sqrt()))
        clean = ((x - rest * x.sin()) / root).clamp(-1, 1)
        x = abar[time].sqrt().float() * clean + (1 - abar[time]).sqrt().float() * ((x - root * clean) / rest)
    assert torch.equal(ddim(process, lambda x, time: x.sin(), lambda step: noise, 20), clean)


@pytest.mark.parametrize("steps, sampling_steps", [(20, 20), (20, 1), (20, 7), (20, 19), (1000, 50), (1, 1), (20, 21), (20, 200), (2, 3)])
def test_any_number_of_steps_begins_in_noise_and_visits_every_time_at_most_once(steps: int, sampling_steps: int) -> None:
    times = sampling_times(steps, sampling_steps)
    assert len(set(times)) == len(times) == sampling_steps
    assert times[0] == steps - 1 and times == sorted(times, reverse=True) and times[-1] >= 0
    assert all(isinstance(time, int) for time in times) == (sampling_steps <= steps)


def test_more_steps_than_the_process_has_divide_it_evenly() -> None:
    assert sampling_times(5, 9) == [4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0]
    assert sampling_times(1, 20) == [0]
