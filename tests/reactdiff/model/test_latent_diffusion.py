import numpy as np
import pytest
import torch

from reactdiff.config import Diffusion
from reactdiff.diffusion.noise import generation_noise
from reactdiff.model.latent_diffusion import LatentDiffusion
from tests.reactdiff.model.small import LATENT, MODEL, assert_empty_batch_flows_back_as_zeros, latent_diffusion, latents


def sample(module: LatentDiffusion, speaker: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return module.sample(speaker, lambda _: noise)


def ranges(frames: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = torch.randn(2, frames, LATENT, generator=torch.Generator().manual_seed(0)) * 3
    return bounds.amin(0), bounds.amax(0)


@pytest.mark.parametrize("normalisation", ["feature", "frame"])
def test_normalisation_maps_the_range_to_plus_and_minus_one_and_back(normalisation: str) -> None:
    module, (minimum, maximum) = latent_diffusion(normalisation=normalisation), ranges()
    module.set_range(minimum, maximum)
    low, high = module.normalise(minimum), module.normalise(maximum)
    if normalisation == "feature":
        low, high = low.amin(0), high.amax(0)
    torch.testing.assert_close(low, -torch.ones_like(low), rtol=0, atol=1e-4)
    torch.testing.assert_close(high, torch.ones_like(high), rtol=0, atol=1e-4)
    latent = torch.randn(3, 2, 100, LATENT)
    torch.testing.assert_close(module.denormalise(module.normalise(latent)), latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.normalise(module.denormalise(latent)), latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_feature_becomes_zero_and_comes_back(value: float) -> None:
    module, (minimum, maximum) = latent_diffusion(), ranges()
    minimum[:, 2] = maximum[:, 2] = value
    maximum[7, 2] += abs(value) * 1e-7
    module.set_range(minimum, maximum)
    latent = torch.randn(2, 100, LATENT)
    latent[..., 2] = value
    normalised = module.normalise(latent)
    assert normalised.isfinite().all() and normalised[..., 2].abs().max() < 1e-5
    torch.testing.assert_close(module.denormalise(normalised), latent, rtol=1e-5, atol=1e-5)


def test_the_range_stays_exact_when_the_weights_become_bfloat16() -> None:
    module, (minimum, maximum) = latent_diffusion(normalisation="frame"), ranges()
    module.set_range(minimum, maximum)
    module = torch.nn.Sequential(module).bfloat16()[0]
    assert module.denoiser.stem.weight.dtype == torch.bfloat16
    assert torch.equal(module.minimum, minimum) and torch.equal(module.maximum, maximum)
    assert {"minimum", "maximum"} <= set(module.state_dict())
    assert module(latents(2, 100)).dtype == torch.float32


def test_a_range_that_does_not_fit_is_refused() -> None:
    module, (minimum, maximum) = latent_diffusion(normalisation="frame"), ranges()
    with pytest.raises(ValueError, match=r"range is \(99, 8\).*needs \(100, 8\)"):
        module.set_range(minimum[:99], maximum[:99])
    with pytest.raises(ValueError, match="minimum must be at most"):
        module.set_range(maximum, minimum)
    with pytest.raises(ValueError, match="NaN"):
        module.set_range(minimum, maximum * torch.nan)
    with pytest.raises(ValueError, match=r"latents of 150 frames.*range of 100 frames"):
        module.normalise(torch.zeros(1, 150, LATENT))


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
@torch.no_grad()
def test_the_loss_is_ten_l1_in_the_space_predicted(prediction: str) -> None:
    module, batch = latent_diffusion(prediction=prediction), latents(3, 100)
    minimum, maximum = ranges()
    module.set_range(minimum, maximum)
    clean, speaker = (module.normalise(batch[name]).reshape(3, 2, 50, LATENT) for name in ("listener", "speaker"))
    for item, loss in enumerate(module(batch)):
        errors = []
        for window in range(2):
            noise, time = batch["noise"][item, window], batch["times"][item, window]
            noisy = module.process.abar[time].sqrt() * clean[item, window] + (1 - module.process.abar[time]).sqrt() * noise
            condition = module.condition(speaker[item, window][None])
            output = module.denoiser(noisy[None].float(), time[None], condition)[0]
            errors.append((output - module.process.target(clean[item, window], noise, time)).abs().mean())
        assert float(loss) == pytest.approx(10 * float(sum(errors)) / 2, rel=1e-4)


@pytest.mark.parametrize("frames", [50, 150, 250])
def test_any_number_of_windows_is_learnt_and_sampled(frames: int) -> None:
    module = latent_diffusion(750)
    assert module(latents(2, frames)).shape == (2,)
    drawn = sample(module, latents(2, frames)["speaker"], torch.randn(2, 3, frames // 50, 50, LATENT))
    assert drawn.shape == (2, 3, frames, LATENT) and drawn.isfinite().all()


def test_a_length_that_does_not_divide_into_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="751 frames"):
        latent_diffusion(751)
    with pytest.raises(ValueError, match="70 frames"):
        latent_diffusion()(latents(1, 100) | {"listener": torch.zeros(1, 70, LATENT)})


def test_many_reactions_at_once_are_those_sampled_one_by_one() -> None:
    module, speaker = latent_diffusion(prediction="x0"), latents(2, 100)["speaker"]
    module.set_range(*ranges())
    noise = torch.from_numpy(
        np.stack([[generation_noise(0, key, 0, k, 2, LATENT) for k in range(3)] for key in ("one", "two")]),
    )
    together = sample(module, speaker, noise)
    for clip in range(2):
        for k in range(3):
            alone = sample(module, speaker[clip : clip + 1], noise[clip : clip + 1, k : k + 1])
            torch.testing.assert_close(together[clip, k], alone[0, 0], rtol=1e-3, atol=1e-3)  # steps multiply the rounding of conditions
    assert not torch.allclose(together[0, 0], together[0, 1], atol=1e-2)


def test_a_reaction_depends_on_its_speaker_window_by_window() -> None:
    module, speaker, noise = latent_diffusion(prediction="x0"), latents(1, 100)["speaker"].float(), torch.randn(1, 1, 2, 50, LATENT)
    changed = speaker.clone()
    changed[:, 50:] += 1
    before, after = sample(module, speaker, noise), sample(module, changed, noise)
    torch.testing.assert_close(before[..., :50, :], after[..., :50, :])
    assert not torch.allclose(before[..., 50:, :], after[..., 50:, :], atol=1e-3)


def test_samples_stay_in_the_range_of_the_training_set() -> None:
    module, (minimum, maximum) = latent_diffusion(), ranges()
    module.set_range(minimum, maximum)
    drawn = sample(module, latents(1, 100)["speaker"], torch.randn(1, 2, 2, 50, LATENT))
    assert (drawn >= minimum.amin(0) - 1e-4).all() and (drawn <= maximum.amax(0) + 1e-4).all()


def test_sampling_takes_the_configured_number_of_steps() -> None:
    module, calls = latent_diffusion(sampling_steps=5), []
    module.denoiser.register_forward_hook(lambda *_: calls.append(1))
    sample(module, latents(1, 50)["speaker"], torch.randn(1, 4, 1, 50, LATENT))
    assert len(calls) == 5


def test_an_empty_batch_has_an_empty_loss_and_zero_gradients() -> None:
    assert_empty_batch_flows_back_as_zeros(latent_diffusion(), latents(0, 100))


def test_gradients_repeat_to_the_bit_under_deterministic_algorithms() -> None:
    def gradients() -> list[torch.Tensor]:
        module = latent_diffusion()
        module(latents(2, 100)).sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_condition_that_normalisation_would_erase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.condition is 32.*at least 64"):
        latent_diffusion(model=MODEL.model_copy(update={"condition": 32}))


@torch.no_grad()
def test_a_new_model_predicts_nothing() -> None:
    module = LatentDiffusion(MODEL, Diffusion(), 50)
    batch = latents(1, 50)
    assert float(module(batch)) == pytest.approx(10 * float(batch["noise"].abs().mean()), rel=1e-5)
