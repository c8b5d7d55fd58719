from typing import Any

import pytest
import torch

from reactdiff import config
from reactdiff.clip import WINDOW
from reactdiff.model.latent_diffusion import Conversation, LatentDiffusion
from reactdiff.model.transformer import FrameTransformer, Past, rotate, rotation
from tests.reactdiff.model.small import LATENT, MODEL, latent_diffusion, latents, randomise

WIDE = MODEL.model_copy(update={"denoiser": "transformer", "width": 16, "layers": 2, "context": 1})
ONLINE = WIDE.model_copy(update={"online": True})


def inputs(windows: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, windows, WINDOW, LATENT), torch.randint(20, (batch, windows)), torch.randn(batch, windows, WINDOW, 16)


def denoiser(model: config.Model) -> FrameTransformer:
    network = randomise(FrameTransformer(model, LATENT))
    assert isinstance(network, FrameTransformer)
    return network


def reach(model: config.Model, changed: int, windows: int = 5) -> tuple[list[int], list[int]]:
    """Windows of the prediction that change with one of the noisy windows, and with one of the speaker's."""
    network = denoiser(model)
    noisy, times, speaker = inputs(windows)
    with torch.no_grad():
        before = network(noisy, times, speaker)
        found = []
        for which in (0, 2):
            given = [noisy.clone(), times, speaker.clone()]
            given[which][:, changed] += 1
            difference = (network(*given) - before).abs().amax((0, 2, 3))
            found.append([window for window in range(windows) if difference[window] > 1e-6])
    return found[0], found[1]


def test_online_no_window_sees_a_later_one() -> None:
    assert reach(ONLINE, changed=2) == ([2, 3, 4], [2, 3, 4])


def test_offline_a_window_sees_as_many_on_either_side_as_two_layers_of_context_one_reach() -> None:
    assert reach(WIDE, changed=2) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert reach(WIDE.model_copy(update={"layers": 1}), changed=2) == ([1, 2, 3], [1, 2, 3])


def test_one_window_after_its_past_is_what_it_is_within_the_clip() -> None:
    network = denoiser(ONLINE)
    noisy, times, speaker = inputs(4)
    times[:, :3] = 0  # finished windows are remembered at time 0
    with torch.no_grad():
        whole = network(noisy, times, speaker)
        past = Past()
        for window in range(4):
            one = slice(window, window + 1)
            torch.testing.assert_close(network(noisy[:, one], times[:, one], speaker[:, one], past), whole[:, one], rtol=1e-4, atol=1e-5)
            past = network.remember(noisy[:, one], speaker[:, one], past)
    assert past.chunks == 4 and {key.shape[2] for key, _ in past.seen} == {2 * WINDOW}, "no more than the context is kept"


@pytest.mark.parametrize("places", [500, 2_000_000])  # the second is a day of 25 frames a second
def test_only_distances_count(places: int) -> None:
    ask, answer = torch.randn(2, 1, 8)
    early, late = rotation(3, 8, 8, ask), rotation(3 + places, 8, 8, ask)
    assert late.dtype == torch.float32
    products = [rotate(ask.expand(8, 8), turn) @ rotate(answer.expand(8, 8), turn).T for turn in (early, late)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0


@pytest.mark.parametrize("model", [WIDE, ONLINE, MODEL.model_copy(update={"online": True})], ids=["offline", "online", "unet online"])
def test_many_reactions_at_once_are_those_sampled_one_by_one(model: config.Model) -> None:
    module = latent_diffusion(200, model, prediction="x0", sampling_steps=3)
    speaker, noise = latents(2, 200)["speaker"].float(), torch.randn(2, 3, 4, WINDOW, LATENT)
    together = module.sample(speaker, lambda _: noise)
    alone = module.sample(speaker[1:], lambda _: noise[1:, 2:])
    torch.testing.assert_close(together[1, 2], alone[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
@pytest.mark.parametrize("sampler, guidance", [("ddim", 1.0), ("ddpm", 1.0), ("dpm++", 2.0)])
def test_reacting_window_by_window_is_sampling_the_whole_clip_online(denoiser: str, sampler: str, guidance: float) -> None:
    assert_reacts_as_it_samples(online(denoiser, sampler, guidance))


def assert_reacts_as_it_samples(module: LatentDiffusion) -> None:
    speaker = latents(2, 200)["speaker"].float()
    whole = module.sample(speaker, draws)
    now, made = Conversation(), []
    for window in range(4):
        reaction, now = module.react(now, lambda number, window=window: draws(number)[:, :, window])
        now = module.hear(now, speaker[:, window * WINDOW : (window + 1) * WINDOW])
        made.append(reaction)
    torch.testing.assert_close(torch.cat(made, dim=2), whole, rtol=1e-3, atol=1e-4)


def test_a_weaker_model_guides_and_remembers_for_itself() -> None:
    module, weak = (online("transformer", "ddim", 1.0) for _ in range(2))
    speaker = latents(2, 200)["speaker"].float()
    plain, module.weaker, module.autoguidance = module.sample(speaker, draws), (weak,), 2.0
    torch.testing.assert_close(module.sample(speaker, draws), plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        weak.denoiser.out.weight.mul_(0.5)
    noise, chunk = draws(0)[:, :, 0].flatten(0, 1)[:, None], module._chunks(torch.zeros(6, WINDOW, LATENT))
    times, condition = torch.full((6, 1), 7.0), module._condition(chunk)
    strong, weaker = (one._denoise(noise, times, condition, Past()) for one in (module, weak))
    seen: list[torch.Tensor] = []

    def sampler(process: object, predict: Any, *_: object) -> torch.Tensor:
        seen.append(predict(noise, 7.0))
        return seen[0]

    module.sampler = sampler  # type: ignore[assignment]
    module.react(Conversation(), lambda _: draws(0)[:, :, 0])
    torch.testing.assert_close(seen[0], 2 * strong - weaker)


@pytest.mark.parametrize("guide", [1.0, 2.0])
def test_reacting_with_a_weaker_model_is_sampling_with_it(guide: float) -> None:
    module, weak = (online("transformer", "ddim", 1.0) for _ in range(2))
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.8)
    module.weaker, module.autoguidance = (weak,), guide
    assert_reacts_as_it_samples(module)


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_online_what_the_speaker_does_changes_nothing_before_the_next_window(denoiser: str) -> None:
    module, speaker = online(denoiser, "ddim", 1.0), latents(2, 200)["speaker"].float()
    changed = speaker.clone()
    changed[:, 2 * WINDOW :] += 1
    before, after = module.sample(speaker, draws), module.sample(changed, draws)
    assert torch.equal(before[:, :, : 3 * WINDOW], after[:, :, : 3 * WINDOW])
    assert not torch.allclose(before[:, :, 3 * WINDOW :], after[:, :, 3 * WINDOW :], atol=1e-3)


def test_an_offline_transformer_is_trained_as_it_samples_with_one_time_for_all_windows() -> None:
    module, batch = latent_diffusion(200, WIDE, prediction="x0"), latents(2, 200)
    same = batch | {"times": batch["times"][:, :1].expand_as(batch["times"])}
    assert torch.equal(module(batch), module(same))
    independent = latent_diffusion(200, ONLINE, prediction="x0")
    assert not torch.equal(independent(batch), independent(same))


def test_a_hidden_speaker_does_not_matter() -> None:
    for model in (MODEL, WIDE):
        module, batch = latent_diffusion(100, model, prediction="x0", condition_dropout=0.5), latents(2, 100)
        hidden = batch | {"hears": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}
        other = hidden | {"speaker": batch["speaker"] + 1}
        first, second = (module(each) for each in (hidden, other))
        assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_a_width_that_heads_cannot_turn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.width is 12.*4 attention heads cannot share evenly.*multiple of 8"):
        denoiser(WIDE.model_copy(update={"width": 12}))


def online(denoiser: str, sampler: str, guidance: float) -> LatentDiffusion:
    model = ONLINE.model_copy(update={"denoiser": denoiser})
    dropout = 0.1 if guidance != 1 else 0.0
    return latent_diffusion(200, model, prediction="x0", sampler=sampler, sampling_steps=3, guidance=guidance, condition_dropout=dropout)


def draws(number: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, WINDOW, LATENT, generator=torch.Generator().manual_seed(number))
