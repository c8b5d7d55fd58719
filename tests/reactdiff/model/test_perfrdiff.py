from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from reactdiff.model.flops import training_flops
from reactdiff.model.init import initialise
from reactdiff.model.perfrdiff import AttributeAutoencoder, SpeakerTokens, WindowDenoiser
from tests.reactdiff.model.small import (
    LATENT,
    MODEL,
    STREAMS,
    assert_empty_batch_flows_back_as_zeros,
    assert_windows_are_denoised_by_themselves,
    clips,
    randomise,
)

PEER = MODEL.model_copy(update={"family": "perfrdiff", "online": True, "width": 16, "layers": 2})
MFCC = 26
WIDTH = 25 + 58 + MFCC + LATENT


def autoencoder() -> AttributeAutoencoder:
    return randomise(AttributeAutoencoder(PEER, STREAMS))


def speaker_tokens() -> SpeakerTokens:
    return randomise(SpeakerTokens(PEER, MFCC))


def window_denoiser(**model: object) -> WindowDenoiser:
    return randomise(WindowDenoiser(PEER.model_copy(update=model)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def modules() -> list[nn.Module]:
    return [AttributeAutoencoder(PEER, STREAMS), SpeakerTokens(PEER, MFCC), WindowDenoiser(PEER)]


# The attribute autoencoder


def test_an_encoding_is_what_a_person_does_as_it_is_then_the_latent_of_each_window() -> None:
    module, batch = autoencoder(), clips(2, 100)
    encoding = module.encode(batch)
    assert module.inputs == ("attributes", "coefficients", "mfcc")
    assert encoding.shape == (2, 100, WIDTH) and module.width == WIDTH and encoding.dtype == torch.float32
    copied = torch.cat([batch[name].float() for name in module.inputs], dim=-1)
    assert torch.equal(encoding[..., :-LATENT], copied)
    latent = encoding[..., -LATENT:].unflatten(1, (2, 50))
    assert torch.equal(latent, latent[:, :, :1].expand_as(latent))
    assert torch.equal(module.decode(encoding[..., : module.target])["attributes"], batch["attributes"])


def test_the_latent_of_a_window_sees_all_of_its_own_frames_and_no_other() -> None:
    module, batch = autoencoder(), clips(1, 100)
    before = module.encode(batch)[0, :, -LATENT:]
    for frame in (50, 99):
        attributes = batch["attributes"].clone()
        attributes[0, frame] += 3
        after = module.encode(batch | {"attributes": attributes})[0, :, -LATENT:]
        assert torch.equal(after[:50], before[:50])
        assert not torch.equal(after[50:], before[50:]), frame


def test_the_loss_is_ten_mse_after_pytorchs_recurrence() -> None:
    module, batch = autoencoder(), clips(2, 100)
    networks = []
    for cell in (module.encoder, module.decoder):
        networks.append(nn.GRU(cell.input_size, cell.hidden_size, batch_first=True))
        networks[-1].load_state_dict({f"{name}_l0": parameter for name, parameter in cell.state_dict().items()})
    expected = []
    for attributes in batch["attributes"]:
        windows = attributes.unflatten(0, (2, 50))
        latent = networks[0](windows)[1][0]
        output = module.out(networks[1](latent[:, None].expand(-1, 50, -1))[0])
        expected.append(10 * nn.functional.mse_loss(output, windows))
        torch.testing.assert_close(module.encode(batch)[len(expected) - 1, ::50, -LATENT:], latent)
    torch.testing.assert_close(module(batch), torch.stack(expected))


def test_an_item_does_not_see_its_neighbours_in_the_batch() -> None:
    module, batch = autoencoder(), clips(3, 50)
    alone = {name: stream[1:2] for name, stream in batch.items()}
    torch.testing.assert_close(module(batch)[1:2], module(alone))
    torch.testing.assert_close(module.encode(batch)[1:2], module.encode(alone))


def test_an_empty_batch_has_an_empty_loss_and_zero_gradients() -> None:
    assert_empty_batch_flows_back_as_zeros(autoencoder(), clips(0, 100))
    assert autoencoder().encode(clips(0, 100)).shape == (0, 100, WIDTH)


def test_bfloat16_weights_give_a_float32_loss_and_copy_what_they_copy_exactly() -> None:
    module, batch = autoencoder(), clips(2, 50)
    full, half = module(batch), module.bfloat16()(batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    assert torch.equal(module.encode(batch)[..., :25], batch["attributes"])


def test_the_autoencoder_learns_to_reconstruct() -> None:
    module = AttributeAutoencoder(PEER, STREAMS)
    initialise(module, 0)
    # A constant face per window is what eight numbers can hold.
    batch = {"attributes": normal(4, 2, 1, 25).expand(-1, -1, 50, -1).flatten(1, 2)}
    first = float(module(batch).mean().detach())
    assert train(module.parameters(), lambda: module(batch).mean(), 60) < 0.7 * first


def test_a_dataset_or_configuration_without_a_voice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.acoustic is empty, but model\.family=perfrdiff listens"):
        AttributeAutoencoder(PEER.model_copy(update={"acoustic": ()}), STREAMS)
    with pytest.raises(ValueError, match=r"model\.acoustic names the stream 'w2v'"):
        AttributeAutoencoder(PEER.model_copy(update={"acoustic": ("w2v",)}), STREAMS)


def test_facial_streams_are_neither_read_nor_needed() -> None:
    module = AttributeAutoencoder(PEER, [stream for stream in STREAMS if stream.kind == "acoustic"])
    assert {stream.name for stream in STREAMS if stream.kind == "facial"}.isdisjoint(module.inputs)
    batch = clips(1, 50)
    module.encode({name: batch[name] for name in module.inputs})


# The condition


def test_a_window_of_the_speaker_becomes_a_token_per_frame_and_kind_and_one_of_its_latent() -> None:
    module, windows = speaker_tokens(), normal(3, 50, WIDTH)
    tokens = module(windows)
    assert tokens.shape == (3, 101, 16)
    for part, changed in ((25 + 58, [7]), (25, [50 + 7]), (0, [])):
        other = windows.clone()
        other[:, 7, part] += 1
        seen = (module(other) != tokens).any(-1)
        assert seen.nonzero()[:, 1].tolist() == changed * 3, "voice, coefficients, then attributes, which the latent stands for"
    other = windows.clone()
    other[:, :, -1] += 1
    assert (module(other) != tokens).any(-1).nonzero()[:, 1].tolist() == [100] * 3


def test_equal_frames_have_different_tokens() -> None:
    tokens = speaker_tokens()(torch.zeros(1, 50, WIDTH))[0]
    assert len(tokens.unique(dim=0)) == 101


def test_training_hides_each_kind_of_token_from_a_fifth_of_the_windows_and_evaluation_none() -> None:
    module, windows = speaker_tokens(), normal(4000, 50, WIDTH)
    tokens = module(windows)
    assert torch.equal(tokens, module(windows)) and tokens.any(-1).all()
    torch.manual_seed(0)
    trained = module.train()(windows)
    hidden = ~trained.any(-1)
    torch.testing.assert_close(trained, torch.where(hidden[..., None], 0, tokens))
    kinds = hidden[:, [0, 50, 100]]
    assert torch.equal(hidden, kinds.repeat_interleave(torch.tensor([50, 50, 1]), dim=1)), "a kind is hidden as a whole"
    torch.testing.assert_close(kinds.float().mean(0), torch.full((3,), 0.2), atol=0.02, rtol=0)
    assert float(kinds.all(1).float().mean()) == pytest.approx(0.008, abs=0.004), "each kind by itself"
    torch.manual_seed(0)
    assert torch.equal(module(windows), trained)


# The denoiser


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, 50, 25), torch.arange(batch) + 3, normal(batch, 101, 16, seed=1)


def test_a_denoised_window_depends_on_itself_its_time_and_its_speaker_and_on_no_other_window() -> None:
    assert_windows_are_denoised_by_themselves(window_denoiser(), *inputs(3))


def test_the_denoiser_knows_the_order_of_frames() -> None:
    module, (noisy, times, tokens) = window_denoiser(), inputs(1)
    assert not torch.allclose(module(noisy.flip(1), times, tokens).flip(1), module(noisy, times, tokens), atol=1e-3)


def test_the_prediction_starts_at_zero() -> None:
    module = WindowDenoiser(PEER)
    initialise(module, 0)
    assert not module(*inputs(2)).any()


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    module = window_denoiser(dropout=0.5)
    assert torch.equal(module(*inputs(1)), module(*inputs(1)))
    torch.manual_seed(0)
    assert not torch.equal(module.train()(*inputs(1)), module(*inputs(1)))


def test_bfloat16_weights_denoise_nearly_as_well() -> None:
    (noisy, times, _), windows = inputs(2), normal(2, 50, WIDTH)
    tokens, module = speaker_tokens(), window_denoiser()
    full = module(noisy, times, tokens(windows))
    half = module.bfloat16()(noisy, times, tokens.bfloat16()(windows))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


def test_speaker_and_denoiser_learn_a_reaction_together() -> None:
    # No token may be hidden: the reaction can be told from the speaker alone.
    tokens, module = SpeakerTokens(PEER, MFCC).eval(), WindowDenoiser(PEER)
    initialise(tokens, 0)
    initialise(module, 0)
    (noisy, times, _), windows = inputs(4), normal(4, 50, WIDTH)
    reaction = windows[..., -1:].mean(1, keepdim=True).expand(-1, 50, 25)
    windows[..., -LATENT:] = windows[..., -LATENT:].mean(1, keepdim=True)

    def loss() -> Tensor:
        return (module(noisy, times, tokens(windows)) - reaction).abs().mean()

    first = float(loss().detach())
    assert train([*tokens.parameters(), *module.parameters()], loss, 60) < 0.5 * first


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.width is 20, which model\.heads=8"):
        window_denoiser(width=20, heads=8)


# All three


def test_floating_point_operations_are_counted_without_memory() -> None:
    with torch.device("meta"):
        codec, tokens, denoiser = modules()
        noisy, times = torch.empty(2, 50, 25), torch.empty(2, dtype=torch.long)
        batch, windows = {"attributes": torch.empty(1, 100, 25)}, torch.empty(2, 50, WIDTH)
    # 2 windows x 50 frames, both cells' three gates of input and state, and the output.
    macs = 100 * (3 * LATENT * (25 + LATENT) + 3 * LATENT * 2 * LATENT + LATENT * 25)
    nobody_s = 100 * 3 * LATENT * 25 + 2 * 2 * 3 * LATENT * LATENT  # gradients of the frames, and of the states that both cells begin with
    assert training_flops(codec, batch) == 2 * (3 * macs - nobody_s)

    class Denoise(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return denoiser(noisy, times, tokens(batch["windows"]))

    assert training_flops(Denoise(), {"windows": windows}) > 3 * 2 * sum(p.numel() for p in denoiser.decoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_weight_has_a_rule(number: int) -> None:
    ours, default = modules()[number], modules()[number]
    for module in (ours, default):
        initialise(module, 0)
    assert all(torch.equal(parameter, default.get_parameter(name)) for name, parameter in ours.named_parameters())


def test_cells_start_as_pytorchs_do() -> None:
    module = AttributeAutoencoder(PEER.model_copy(update={"latent": 64}), STREAMS)
    initialise(module, 0)
    for name, parameter in [*module.encoder.named_parameters(), *module.decoder.named_parameters()]:
        assert float(parameter.detach().abs().max()) == pytest.approx(1 / 8, rel=0.05), name


def train(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int) -> float:
    optimiser = torch.optim.Adam(parameters, 3e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return float(loss().detach())
