import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from reactdiff import config
from reactdiff.generate import Reactor
from reactdiff.model.belfusion import KL_WEIGHT, BehaviourVAE, WindowMLP, speaker_window
from reactdiff.model.init import initialise
from reactdiff.model.latent_diffusion import LatentDiffusion
from tests.reactdiff.model.small import (
    MODEL,
    STREAMS,
    assert_empty_batch_flows_back_as_zeros,
    assert_windows_are_denoised_by_themselves,
    clips,
    latents,
    randomise,
)

PEER = MODEL.model_copy(update={"family": "belfusion", "latent": 2, "width": 16, "layers": 3})
FEATURES = 50 * PEER.latent


def vae(**model: object) -> BehaviourVAE:
    return randomise(BehaviourVAE(PEER.model_copy(update=model), STREAMS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows(items: int, frames: int) -> dict[str, Tensor]:
    return {"attributes": clips(items, frames)["attributes"], "noise": normal(items, frames // 50, FEATURES)}


# Stage 1


def test_the_latent_of_a_window_lies_spread_over_its_frames_and_sees_all_of_them_and_no_other() -> None:
    module, batch = vae(), windows(2, 100)
    encoding = module.encode(batch)
    assert encoding.shape == (2, 100, module.width) and module.width == 2 and encoding.dtype == torch.float32
    for frame in (50, 99):
        attributes = batch["attributes"].clone()
        attributes[:, frame] += 3
        after = module.encode({"attributes": attributes})
        assert torch.equal(after[:, :50], encoding[:, :50]) and (after[:, 50:] != encoding[:, 50:]).any(dim=1).all(), frame
    decoded = module.decode(encoding)["attributes"]
    other = encoding.clone()
    other[:, 70, 1] += 3
    changed = (module.decode(other)["attributes"] != decoded).any(-1)
    assert decoded.shape == (2, 100, 25) and not changed[:, :50].any() and changed[:, 50:].all()


def test_the_loss_is_ten_mse_after_pytorchs_recurrence_and_the_weighted_divergence() -> None:
    module, batch = vae(), windows(2, 100)
    networks = []
    for cell in (module.encoder, module.decoder):
        networks.append(nn.GRU(cell.input_size, cell.hidden_size, batch_first=True))
        networks[-1].load_state_dict({f"{name}_l0": parameter for name, parameter in cell.state_dict().items()})
    with torch.no_grad():  # a divergence that differs from item to item and is not lost beside the reconstruction
        module.mean.weight *= 50
    expected = []
    for attributes, noise in zip(batch["attributes"].unflatten(1, (2, 50)), batch["noise"], strict=True):
        state = networks[0](attributes)[1][0]
        posterior = Normal(module.mean(state), (module.log_variance(state) / 2).exp())
        heard = module.memory(posterior.mean + posterior.stddev * noise)
        output = module.out(networks[1](heard[:, None].expand(-1, 50, -1))[0])
        divergence = kl_divergence(posterior, Normal(0.0, 1.0)).mean()
        expected.append(10 * nn.functional.mse_loss(output, attributes) + KL_WEIGHT * divergence)
    torch.testing.assert_close(module(batch), torch.stack(expected))


def test_what_is_kept_is_the_mean_of_the_posterior() -> None:
    module, batch = vae(), windows(2, 50)
    quiet = batch | {"noise": torch.zeros_like(batch["noise"])}
    with torch.no_grad():
        module.mean.weight.zero_()
        module.mean.bias.zero_()
        module.log_variance.weight.zero_()
        module.log_variance.bias.zero_()
    again = module.decode(module.encode(batch))["attributes"]
    torch.testing.assert_close(module(quiet), 10 * (again - batch["attributes"]).square().mean((1, 2)))


def test_attributes_are_bounded_where_that_is_asked() -> None:
    free, held = (vae(bounded=asked).decode(20 * normal(1, 50, 2))["attributes"].detach() for asked in (False, True))
    assert float(free[..., :15].min()) < 0 and 0 <= float(held[..., :15].min()) and float(held[..., :15].max()) <= 1


def test_an_empty_batch_has_an_empty_loss_and_zero_gradients() -> None:
    assert_empty_batch_flows_back_as_zeros(vae(), windows(0, 100))
    assert vae().encode(windows(0, 100)).shape == (0, 100, 2)


def test_bfloat16_weights_give_a_float32_loss() -> None:
    module, batch = vae(), windows(2, 50)
    full, half = module(batch), module.bfloat16()(batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


# Stage 2


def denoiser(**model: object) -> WindowMLP:
    return randomise(WindowMLP(PEER.model_copy(update=model)))


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, 50, 2), torch.arange(batch) + 3, normal(batch, 16, seed=1)


def test_a_denoised_window_depends_on_itself_its_time_and_its_speaker_and_on_no_other_window() -> None:
    assert_windows_are_denoised_by_themselves(denoiser(), *inputs(3))


def test_the_prediction_starts_at_zero_and_every_weight_has_a_rule() -> None:
    for module in (WindowMLP(PEER), BehaviourVAE(PEER, STREAMS), speaker_window(PEER)):
        initialise(module, 0)
        assert all(parameter.isfinite().all() for parameter in module.parameters())
        if isinstance(module, WindowMLP):
            assert not module(*inputs(2)).any()


@pytest.mark.parametrize("online", [False, True])
def test_a_window_of_the_listener_hears_the_speaker_s_of_the_same_time_and_online_the_one_before(online: bool) -> None:
    model, asked = PEER.model_copy(update={"online": online}), config.Diffusion(prediction="x0", sampling_steps=3)
    module = randomise(LatentDiffusion(model, asked, 150))
    speaker, noise = latents(1, 150)["speaker"][..., :2].float(), normal(1, 2, 3, 50, 2, seed=1)
    drawn = module.sample(speaker, lambda _: noise)
    other = speaker.clone()
    other[:, 50:100] += 1
    changed = (module.sample(other, lambda _: noise) != drawn).unflatten(2, (3, 50)).flatten(3).any(-1)
    assert drawn.shape == (1, 2, 150, 2) and changed.tolist() == [[[False, not online, online]] * 2]


def test_it_learns_a_reaction_to_the_speaker() -> None:
    module = LatentDiffusion(PEER, config.Diffusion(prediction="x0"), 50)
    initialise(module, 0)
    batch = {name: value[..., :2] if name != "times" else value for name, value in latents(8, 50).items()}
    batch["listener"] = batch["speaker"].flip(1)
    limits = (batch["listener"].float().amin((0, 1)), batch["listener"].float().amax((0, 1)))
    module.set_range(*(limit.expand(50, -1) for limit in limits))
    optimiser, first = torch.optim.Adam(module.parameters(), 3e-3), float(module(batch).mean().detach())
    for _ in range(60):
        optimiser.zero_grad()
        module(batch).mean().backward()
        optimiser.step()
    assert float(module(batch).mean().detach()) < 0.5 * first


def test_reactions_are_attributes_alone_and_keyed_by_clip_direction_and_number() -> None:
    codec = vae()
    model = Reactor(codec, randomise(LatentDiffusion(PEER, config.Diffusion(prediction="x0", sampling_steps=3), 100, codec.parts)))
    speakers = codec.encode(windows(2, 100)).detach().numpy()
    both = model.react(speakers, [("a", 0), ("b", 1)], 3, seed=5)
    assert {name: reaction.shape for name, reaction in both.items()} == {"attributes": (2, 3, 100, 25)}
    alone = model.react(speakers[1:], [("b", 1)], 2, seed=5)
    torch.testing.assert_close(torch.from_numpy(alone["attributes"][0]), torch.from_numpy(both["attributes"][1, :2]), atol=1e-5, rtol=1e-5)
