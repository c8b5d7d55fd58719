import re

import pytest
import torch

from reactdiff import config
from reactdiff.clip import AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.data.sample import StreamSpec
from reactdiff.model.attention import AttentionUnit
from reactdiff.model.autoencoder import Autoencoder
from tests.reactdiff.model.small import LATENT, MODEL, STREAMS, assert_empty_batch_flows_back_as_zeros, autoencoder, clips


@pytest.mark.parametrize("frames", [50, 150, 750])
def test_any_length_is_encoded_and_decoded(frames: int) -> None:
    module = autoencoder()
    latent = module.encode(clips(2, frames))
    assert latent.shape == (2, frames, LATENT)
    assert {name: output.shape for name, output in module.decode(latent).items()} == {
        "attributes": (2, frames, 25),
        "coefficients": (2, frames, 58),
    }


def test_the_loss_is_ten_l1_plus_ten_mse_of_each_item() -> None:
    module, batch = autoencoder(), clips(3, 50)
    output = module.decode(module.encode(batch))
    expected = [
        10 * torch.nn.functional.l1_loss(output["attributes"][item], batch["attributes"][item])
        + 10 * torch.nn.functional.mse_loss(output["coefficients"][item], batch["coefficients"][item])
        for item in range(3)
    ]
    torch.testing.assert_close(module(batch), torch.stack(expected))


def test_an_item_does_not_see_its_neighbours_in_the_batch() -> None:
    module, batch = autoencoder(), clips(3, 50)
    alone = {name: stream[1:2] for name, stream in batch.items()}
    torch.testing.assert_close(module(batch)[1:2], module(alone), rtol=1e-5, atol=1e-5)


def test_every_input_stream_matters_and_no_other_is_read() -> None:
    module, batch = autoencoder(), clips(1, 50)
    latent = module.encode(batch)
    assert set(module.inputs) == {"au", "fer", "va", "mfcc"}
    for name in module.inputs:
        assert not torch.allclose(module.encode(batch | {name: batch[name] + 1}), latent, atol=1e-4), name
    assert torch.equal(module.encode({name: batch[name] for name in module.inputs}), latent)


def test_two_acoustic_streams_are_read_first_asking_second() -> None:
    model = MODEL.model_copy(update={"acoustic": ("mfcc", "w2v")})
    module = Autoencoder(model, [*STREAMS, StreamSpec("w2v", "acoustic", 40)])
    assert module.inputs == ("au", "fer", "va", "mfcc", "w2v")
    assert module.encoder.acoustic.first.q.in_features == 26 and module.encoder.acoustic.first.kv.in_features == 40


def test_an_empty_batch_has_an_empty_loss_and_zero_gradients() -> None:
    assert_empty_batch_flows_back_as_zeros(autoencoder(), clips(0, 50))


def test_bfloat16_weights_take_half_precision_inputs_and_give_a_float32_loss() -> None:
    module, batch = autoencoder(), clips(2, 50)
    full = module(batch)
    loss = module.bfloat16()(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.05)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    module, batch = autoencoder(dropout=0.5), clips(1, 50)
    assert torch.equal(module(batch), module(batch))
    torch.manual_seed(0)
    assert not torch.equal(module.train()(batch), module(batch))


def test_a_stream_the_dataset_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(ValueError, match=r"model\.acoustic names the stream 'w2v'.*it has: au \(facial, 15\).*mfcc \(acoustic, 26\)"):
        Autoencoder(config.Model(), STREAMS)
    with pytest.raises(ValueError, match=re.escape("model.facial names the stream 'mfcc'")):
        Autoencoder(MODEL.model_copy(update={"facial": ("mfcc",)}), STREAMS)


@pytest.mark.parametrize("field", ["hidden", "latent"])
def test_a_width_that_heads_cannot_share_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{field} is 18, which model\.heads=4"):
        Autoencoder(MODEL.model_copy(update={field: 18}), STREAMS)


@torch.no_grad()
def test_online_no_window_knows_another() -> None:
    module, streams = autoencoder(online=True), clips(2, 150)
    changed = {name: torch.cat((stream[:, :100], stream[:, 100:] + 1), dim=1) for name, stream in streams.items()}
    before, after = module.encode(streams), module.encode(changed)
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.allclose(before[:, 100:], after[:, 100:], atol=1e-3)
    alone = module.encode({name: stream[:, 50:100] for name, stream in streams.items()})
    torch.testing.assert_close(before[:, 50:100], alone, rtol=1e-4, atol=1e-5)
    decoded, one = module.decode(before), module.decode(before[:, 50:100])
    assert all(torch.allclose(decoded[name][:, 50:100], one[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    "change, units",
    [
        ({}, {"facial", "acoustic", "inter"}),
        ({"intra": False}, {"inter"}),
        ({"inter": False}, {"facial", "acoustic"}),
        ({"acoustic": ()}, {"facial"}),
        ({"facial": ()}, {"acoustic"}),
    ],
    ids=["whole", "no intra", "no inter", "face", "voice"],
)
@torch.no_grad()
def test_an_ablation_leaves_out_its_attention_and_nothing_else(change: dict[str, object], units: set[str]) -> None:
    module, streams = autoencoder(**change), clips(1, 50)
    names = [name for name, layer in module.encoder.named_modules() if isinstance(layer, AttentionUnit)]
    assert {name.partition(".")[0] for name in names} == units
    latent = module.encode(streams)
    assert module(streams).shape == (1,) and latent.shape == (1, 50, LATENT)
    for name in ("au", "fer", "va", "mfcc"):
        moved = not torch.allclose(module.encode(streams | {name: streams[name] + torch.randn(streams[name].shape)}), latent, atol=1e-5)
        assert moved == (name in module.inputs), f"every stream that is read matters: {name}"


@torch.no_grad()
def test_bounded_heads_give_only_possible_attributes() -> None:
    attributes = autoencoder(bounded=True).decode(100 * torch.randn(2, 50, LATENT))["attributes"]
    assert attributes[..., AU].min() >= 0 and attributes[..., AU].max() <= 1
    assert attributes[..., VALENCE_AROUSAL].abs().max() <= 1
    torch.testing.assert_close(attributes[..., EXPRESSION].sum(-1), torch.ones(2, 50))
    free = autoencoder().decode(100 * torch.randn(2, 50, LATENT))["attributes"]
    assert free.min() < -1 or free.max() > 1
