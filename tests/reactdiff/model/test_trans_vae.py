import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from reactdiff.data.sample import StreamSpec
from reactdiff.model.flops import training_flops
from reactdiff.model.init import initialise
from reactdiff.model.trans_vae import KL_WEIGHT, TransVAE
from tests.reactdiff.model.small import LATENT, MODEL, STREAMS, assert_empty_batch_flows_back_as_zeros, clips, randomise

PEER = MODEL.model_copy(update={"family": "trans-vae", "width": 16, "layers": 2})


def trans_vae(**model: object) -> TransVAE:
    return randomise(TransVAE(PEER.model_copy(update=model), STREAMS))


def initialised() -> TransVAE:
    module = TransVAE(PEER, STREAMS)
    initialise(module, 0)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dyads(items: int, frames: int) -> dict[str, Tensor]:
    return clips(items, frames) | {"noise": normal(items, LATENT)}


@pytest.mark.parametrize("frames", [50, 150, 750])
def test_any_length_is_encoded_and_reacted_to(frames: int) -> None:
    module = trans_vae()
    encoding = module.encode(clips(2, frames))
    assert encoding.shape == (2, frames, module.width) and module.width == 2 * LATENT and encoding.dtype == torch.float32
    assert torch.equal(encoding, encoding[:, :1].expand_as(encoding)), "one latent for the whole clip"
    assert {name: reactions.shape for name, reactions in module.react(encoding, normal(2, 3, LATENT)).items()} == {
        "attributes": (2, 3, frames, 25),
        "coefficients": (2, 3, frames, 58),
    }


def test_the_loss_is_reconstruction_plus_weighted_divergence_of_each_item() -> None:
    module, batch = trans_vae(), dyads(3, 50)
    with torch.no_grad():  # a divergence that differs from item to item and is not lost beside the reconstruction
        module.mean.weight *= 50
    encoding = module.encode(batch)
    output = module.react(encoding, batch["noise"][:, None])
    mean, log_variance = encoding[:, 0].chunk(2, dim=-1)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean(1)
    expected = [
        10 * torch.nn.functional.mse_loss(output["attributes"][item, 0], batch["attributes"][item])
        + 10 * torch.nn.functional.mse_loss(output["coefficients"][item, 0], batch["coefficients"][item])
        + KL_WEIGHT * divergence[item]
        for item in range(3)
    ]
    assert float((KL_WEIGHT * divergence).std().detach()) > 0.01
    torch.testing.assert_close(module(batch), torch.stack(expected))


def test_the_posterior_reads_every_stream_of_the_speaker_and_nothing_of_the_listener() -> None:
    module, batch = trans_vae(), clips(1, 50)
    encoding = module.encode(batch)
    assert module.inputs == ("au", "fer", "va", "mfcc")
    assert torch.equal(module.encode({name: batch[name] for name in module.inputs}), encoding)
    for name in module.inputs:
        assert not torch.allclose(module.encode(batch | {name: batch[name] + 1}), encoding, atol=1e-4), name


def test_the_order_of_frames_matters() -> None:
    module, batch = trans_vae(), clips(1, 50)
    reversed_ = {name: stream.flip(1) for name, stream in batch.items()}
    assert not torch.allclose(module.encode(reversed_), module.encode(batch), atol=1e-4)
    attributes = module.react(module.encode(batch), normal(1, 1, LATENT))["attributes"][0, 0]
    assert len(attributes.unique(dim=0)) == 50, "every frame's position asks for a face of its own"


def test_reactions_differ_by_their_noise_alone_and_not_at_all_without_variance() -> None:
    module = trans_vae()
    encoding, noise = module.encode(clips(2, 50)), normal(2, 4, LATENT)
    noise[:, 1] = noise[:, 0]
    reactions = module.react(encoding, noise)
    for reaction in reactions.values():
        torch.testing.assert_close(reaction[:, 1], reaction[:, 0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(reaction[:, 2], reaction[:, 0], atol=1e-3)
        assert not reaction.requires_grad
    encoding[..., LATENT:] = -float("inf")
    for reaction in module.react(encoding, noise).values():
        torch.testing.assert_close(reaction, reaction[:, :1].expand_as(reaction), atol=1e-5, rtol=1e-5)


def test_attributes_keep_their_bounds_where_asked() -> None:
    for asked in (False, True):
        module = trans_vae(bounded=asked)
        attributes = module.react(module.encode(clips(1, 50)), 5 * normal(1, 2, LATENT))["attributes"]
        inside = (attributes[..., :15] >= 0).all() and (attributes[..., 15:].abs() <= 1).all()
        assert inside == asked
        assert torch.allclose(attributes[..., 17:].sum(-1), torch.ones(1, 2, 50)) == asked


def test_a_latent_is_the_mean_plus_so_many_standard_deviations() -> None:
    module = trans_vae()
    mean, deviation, noise = normal(1, LATENT), torch.linspace(0.1, 3, LATENT), normal(1, 1, LATENT) * 2
    drawn = module.react(torch.cat([mean, deviation.log()[None] * 2], dim=-1)[:, None].expand(-1, 50, -1), noise)
    given = module.react(torch.cat([mean + deviation * noise[0], mean], dim=-1)[:, None].expand(-1, 50, -1), torch.zeros(1, 1, LATENT))
    for name in drawn:
        torch.testing.assert_close(drawn[name], given[name], atol=1e-5, rtol=1e-5)


def test_mean_and_variance_have_a_query_each() -> None:
    module = trans_vae()
    module.log_variance.load_state_dict(module.mean.state_dict())
    mean, log_variance = module.encode(clips(1, 50))[0, 0].chunk(2)
    assert not torch.allclose(mean, log_variance, atol=1e-3)


def test_every_weight_learns() -> None:
    module = trans_vae()
    module(dyads(2, 50)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_a_reaction_does_not_depend_on_how_many_are_drawn_with_it() -> None:
    module = trans_vae()
    encoding, noise = module.encode(clips(2, 50)), normal(2, 3, LATENT)
    together, alone = module.react(encoding, noise), module.react(encoding[1:], noise[1:, 2:])
    for name in together:
        torch.testing.assert_close(together[name][1:, 2:], alone[name], atol=1e-5, rtol=1e-5)


def test_an_item_does_not_see_its_neighbours_in_the_batch() -> None:
    module, batch = trans_vae(), dyads(3, 50)
    alone = {name: stream[1:2] for name, stream in batch.items()}
    torch.testing.assert_close(module(batch)[1:2], module(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.encode(batch)[1:2], module.encode(alone), atol=1e-5, rtol=1e-5)


def test_an_empty_batch_has_an_empty_loss_and_zero_gradients() -> None:
    assert_empty_batch_flows_back_as_zeros(trans_vae(), dyads(0, 50))


def test_the_encoding_survives_half_precision() -> None:
    module = initialised().eval()
    encoding, noise = module.encode(clips(2, 50)), normal(2, 2, LATENT)
    for name, reactions in module.react(encoding.half(), noise).items():
        torch.testing.assert_close(reactions, module.react(encoding, noise)[name], atol=0.01, rtol=0.01)


def test_bfloat16_weights_take_half_precision_inputs_and_give_a_float32_loss() -> None:
    module, batch = initialised().eval(), dyads(2, 50)
    full, half = module(batch), module.bfloat16()(batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    with torch.no_grad():
        reactions = module.react(module.encode(batch), batch["noise"][:, None])
    assert all(reaction.isfinite().all() for reaction in reactions.values())


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    module, batch = trans_vae(dropout=0.5), dyads(1, 50)
    assert torch.equal(module(batch), module(batch))
    torch.manual_seed(0)
    assert not torch.equal(module.train()(batch), module(batch))


def test_the_model_learns_its_clips() -> None:
    module, batch = initialised(), dyads(2, 50)
    batch["attributes"], batch["coefficients"] = (batch[name][:, :1].expand(-1, 50, -1) for name in ("attributes", "coefficients"))
    first = float(module(batch).mean().detach())
    optimiser = torch.optim.Adam(module.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimiser.zero_grad()
        module(batch).mean().backward()
        optimiser.step()
    assert float(module.eval()(batch).mean().detach()) < 0.6 * first


def test_floating_point_operations_are_counted_without_memory() -> None:
    with torch.device("meta"):
        module = TransVAE(PEER, STREAMS)
        batch = {name: torch.empty_like(tensor, device="meta") for name, tensor in dyads(1, 100).items()}
    # At least every weight of a layer once for each frame it is applied to.
    weights = sum(layer.linear1.weight.numel() + layer.linear2.weight.numel() for layer in (*module.encoder.layers, *module.decoder.layers))
    assert training_flops(module, batch) > 3 * 2 * 100 * weights


def test_every_weight_has_a_rule() -> None:
    ours, again = initialised(), initialised()
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in ours.named_parameters())


def test_queries_start_with_unit_variance() -> None:
    module = TransVAE(PEER.model_copy(update={"width": 512}), STREAMS)
    initialise(module, 0)
    assert float(module.queries.weight.detach().std()) == pytest.approx(1, abs=0.05)


def test_a_stream_the_dataset_lacks_or_a_width_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.facial names the stream 'au'"):
        TransVAE(PEER, [StreamSpec("mfcc", "acoustic", 26)])
    with pytest.raises(ValueError, match=r"model\.width is 20, which model\.heads=8"):
        trans_vae(width=20, heads=8)
