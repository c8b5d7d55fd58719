import math

import numpy as np
import pytest
import torch

from reactdiff.config import Diffusion
from reactdiff.diffusion.prediction import PREDICTIONS, noise_of
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.schedule import SCHEDULES

COSINE_20 = """.992007 .972093 .940739 .898706 .847012 .786911 .719858 .647478 .571527 .493844
    .416312 .340810 .269168 .203121 .144272 .094046 .053659 .024092 .006060 .000006"""

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def nothing(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64)


def test_cosine_is_the_published_table() -> None:
    abar = Process(Diffusion()).abar
    assert [f"{value:.6f}"[1:] for value in abar.tolist()] == COSINE_20.split()
    assert 1 / math.sqrt(abar[19]) == pytest.approx(406, abs=1)


@pytest.mark.parametrize("steps", [1, 7, 20, 1000])
def test_cosine_is_the_product_of_clamped_betas(steps: int) -> None:
    def left(step: int) -> float:
        return math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = np.array([min(1 - left(step + 1) / left(step), 0.999) for step in range(steps)])
    product = torch.from_numpy(np.cumprod(1 - betas))
    process = Process(Diffusion(steps=steps))
    torch.testing.assert_close(process.abar, product, rtol=1e-12, atol=0)
    alpha, sigma = process.scales(torch.arange(steps), torch.empty(steps, 1))
    assert torch.equal(alpha[:, 0], product.sqrt().float()) and torch.equal(sigma[:, 0], (1 - product).sqrt().float())


@each_schedule
@pytest.mark.parametrize("steps", [1, 2, 20, 250, 4000])
def test_every_process_falls_from_clean_to_noise_and_never_to_nothing(schedule: str, steps: int) -> None:
    abar = Process(Diffusion(schedule=schedule, steps=steps)).abar
    assert abar.shape == (steps,) and abar.dtype == torch.float64
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    assert (abar < before).all() and (abar >= 0.000999999 * before).all() and 0 < abar[-1] < 1.001e-3


@each_schedule
def test_steps_stand_at_their_place_of_the_schedule(schedule: str) -> None:
    process = Process(Diffusion(schedule=schedule))
    expected = SCHEDULES[schedule].log_snr(np.arange(1, 20) / 20)
    assert process.log_snr(torch.arange(19)).tolist() == pytest.approx(expected.tolist())


def test_whole_times_are_the_table_and_log_snr_is_linear_between_them() -> None:
    process = Process(Diffusion())
    whole = torch.arange(20)
    exact = process.log_snr(whole)
    assert torch.equal(process.log_snr(whole.double()), exact) and torch.equal(process.log_snr(whole.float()), exact)
    assert torch.equal(process.scales(whole.double(), nothing(20))[0], process.scales(whole, nothing(20))[0])
    torch.testing.assert_close(exact.sigmoid(), process.abar, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        process.log_snr(torch.tensor([3.25, 18.5])), torch.stack([exact[3:5].lerp(exact[4:6], 0.25)[0], exact[18:].mean()])
    )


@pytest.mark.parametrize("shape", [(), (20,), (20, 3)])
def test_scales_broadcast_from_the_leading_dimensions_of_any_number_of_times(shape: tuple[int, ...]) -> None:
    process = Process(Diffusion())
    times = torch.full(shape, 7)
    alpha, sigma = process.scales(times, torch.empty(20, 3, 50, 8))
    assert alpha.shape == sigma.shape == shape + (1,) * (4 - len(shape)) and alpha.dtype == torch.float32
    assert alpha.unique().item() == pytest.approx(math.sqrt(0.647478), abs=1e-6)
    assert (alpha**2 + sigma**2).flatten().tolist() == pytest.approx([1] * times.numel())


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_a_prediction_gives_back_the_clean_latent_it_was_made_from(prediction: str) -> None:
    process = Process(Diffusion(prediction=prediction))
    clean, noise = torch.randn(2, 20, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(20)
    noisy = process.q_sample(clean, noise, times)
    torch.testing.assert_close(process.clean(noisy, process.target(clean, noise, times), times), clean, rtol=0, atol=1e-6)


def test_v_on_data_of_variance_one_is_edm_s_whole_preconditioning() -> None:
    """Karras et al., 2022, table 1, with sigma_data = 1: D(x) = c_skip x + c_out F(c_in x) of x = x_0 + s noise; F is -v."""
    process = Process(Diffusion(prediction="v", schedule="karras"))
    clean, noise = torch.randn(2, 20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(20)
    alpha, sigma = process.scales(times, clean)
    s = sigma / alpha
    theirs, answer = clean + s * noise, torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs / (s**2 + 1).sqrt(), process.q_sample(clean, noise, times))
    denoised = theirs / (s**2 + 1) + s / (s**2 + 1).sqrt() * answer
    torch.testing.assert_close(process.clean(process.q_sample(clean, noise, times), -answer, times), denoised)
    target = (clean - theirs / (s**2 + 1)) / (s / (s**2 + 1).sqrt())
    torch.testing.assert_close(-process.target(clean, noise, times), target, rtol=1e-6, atol=1e-6)


def test_flow_matching_is_the_straight_line_and_ddim_is_euler_along_it() -> None:
    process = Process(Diffusion(prediction="flow", schedule="flow"))
    clean, noise = torch.randn(2, 19, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(19)  # the last step is all noise, which no process of ours is
    u = ((times.double() + 1) / 20)[:, None]
    alpha, sigma = process.scales(times, clean)
    torch.testing.assert_close(process.q_sample(clean, noise, times) * (1 - u) / alpha, (1 - u) * clean + u * noise)
    velocity = torch.randn(19, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noisy = process.q_sample(clean, noise, times)
    line = noisy * (1 - u) / alpha
    guess = process.clean(noisy, velocity, times)
    step = alpha[:-1] * guess[1:] + sigma[:-1] * noise_of(noisy[1:], guess[1:], alpha[1:], sigma[1:])
    torch.testing.assert_close(step * (1 - u[:-1]) / alpha[:-1], line[1:] + (u[:-1] - u[1:]) * velocity[1:])


@each_schedule
def test_times_are_where_the_log_snr_is_and_the_ends_beyond_them(schedule: str) -> None:
    process = Process(Diffusion(schedule=schedule))
    times = np.array([0.0, 0.3, 7.75, 19.0])
    np.testing.assert_allclose(process.times(process.log_snr(torch.from_numpy(times)).numpy()), times, atol=1e-9)
    assert process.times(np.array([1e3, -1e3])).tolist() == [0, 19]


def test_a_weight_between_two_steps_lies_between_theirs() -> None:
    process = Process(Diffusion(weighting="min-snr", prediction="v"))
    low, high = process.weight(torch.tensor([4, 5])).tolist()
    assert float(process.weight(torch.tensor(4.25))) == pytest.approx(0.75 * low + 0.25 * high, rel=1e-6)


def test_v_is_the_slope_of_the_circle_from_clean_to_noise() -> None:
    process = Process(Diffusion(prediction="v"))
    clean, noise = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.acos(process.abar.sqrt())
    slope = -angle.sin() * clean + angle.cos() * noise
    torch.testing.assert_close(process.target(clean, noise, torch.arange(20)), slope)


@each_schedule
@pytest.mark.parametrize("weighting", ["uniform", "min-snr", "elbo"])
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_weights_are_positive_with_mean_one(schedule: str, weighting: str, prediction: str) -> None:
    for steps in (1, 2, 20, 1000):
        process = Process(Diffusion(schedule=schedule, weighting=weighting, prediction=prediction, steps=steps))
        weight = process.weight(torch.arange(steps))
        assert weight.dtype == torch.float32 and (weight > 0).all()
        assert float(weight.double().mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("weighting", ["min-snr", "elbo"])
def test_a_weighting_means_the_same_whatever_is_predicted(weighting: str) -> None:
    """The weighted squared error of equal guesses is equal but for the normalisation."""
    clean, noise, guess = torch.randn(3, 20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times, losses = torch.arange(20), {}
    for prediction in PREDICTIONS:
        process = Process(Diffusion(weighting=weighting, prediction=prediction))
        noisy = process.q_sample(clean, noise, times)
        alpha, sigma = process.scales(times, clean)
        error = process.target(guess, (noisy - alpha * guess) / sigma, times) - process.target(clean, noise, times)
        losses[prediction] = process.weight(times) * (error**2).mean(1)
    for loss in losses.values():
        torch.testing.assert_close(loss / loss[5], losses["x0"] / losses["x0"][5], rtol=1e-5, atol=0)


def test_weights_are_those_of_their_papers() -> None:
    times = torch.arange(19)
    snr = (process := Process(Diffusion(schedule="linear", weighting="min-snr", prediction="v"))).log_snr(times).exp()
    expected = snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(process.weight(times) / process.weight(times)[9], (expected / expected[9]).float())
    elbo = Process(Diffusion(schedule="linear", weighting="elbo")).weight(times)
    slope = -SCHEDULES["linear"].derivative(np.arange(1, 20) / 20)
    torch.testing.assert_close(elbo / elbo[9], torch.from_numpy(slope / slope[9]).float())
    assert Process(Diffusion()).weight(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[1] * 3] * 2


def test_a_process_made_for_the_meta_device_has_its_tables() -> None:
    with torch.device("meta"):
        process = Process(Diffusion(weighting="elbo"))
        shapes = process.scales(torch.empty(4, dtype=torch.int64), torch.empty(4, 50, 8))
    assert [scale.shape for scale in shapes] == [(4, 1, 1)] * 2 and shapes[0].is_meta
    assert process.abar.device.type == process.weight(torch.arange(20)).device.type == "cpu"
