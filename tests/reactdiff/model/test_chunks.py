"""Online in chunks: what a denoiser is trained on is what it meets, and nothing is known before it was heard."""

import pytest
import torch

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW
from reactdiff.data.sample import StreamSpec
from reactdiff.model.latent_diffusion import Conversation, LatentDiffusion
from reactdiff.model.raw_streams import RawStreams
from reactdiff.model.transformer import FrameTransformer, Past
from reactdiff.stage import DiffusionStage, Source
from tests.reactdiff.model.small import MODEL, STREAMS, clips, randomise

FEATURES, CHUNKS = 3, 6
WIDE = MODEL.model_copy(update={"denoiser": "transformer", "width": 16, "layers": 2, "context": 1})
PLAIN = {"online": True, "chunk": 10}
FULL = PLAIN | {"patch": 5, "lags": (5, 10, 25)}
NARROW = {"online": True, "chunk": 5, "patch": 5, "lags": (0, 20)}
kinds = pytest.mark.parametrize("kind", [PLAIN, FULL, NARROW], ids=["plain", "full", "narrow"])


def denoiser(kind: dict[str, object]) -> FrameTransformer:
    network = randomise(FrameTransformer(WIDE.model_copy(update=kind), FEATURES))
    assert isinstance(network, FrameTransformer)
    return network


def inputs(network: FrameTransformer, batch: int = 2, chunks: int = CHUNKS) -> tuple[torch.Tensor, ...]:
    """Noisy chunks, their times, the embedded speaker, and finished chunks."""
    torch.manual_seed(0)
    noisy, clean = torch.randn(2, batch, chunks, network.tokens * network.patch, FEATURES)
    return noisy, torch.randint(1, 20, (batch, chunks)), torch.randn(batch, chunks, network.tokens, 16), clean


@kinds
def test_a_chunk_under_a_clean_history_is_what_it_is_after_the_finished_ones(kind: dict[str, object]) -> None:
    network = denoiser(kind)
    noisy, times, speaker, clean = inputs(network, chunks=14)  # beyond the context
    with torch.no_grad():
        whole, past = network(noisy, times, speaker, history=clean), Past()
        for chunk in range(14):
            one = slice(chunk, chunk + 1)
            alone = network(noisy[:, one], times[:, one], speaker[:, one], past)
            torch.testing.assert_close(alone, whole[:, one], rtol=1e-4, atol=1e-5)
            past = network.remember(clean[:, one], speaker[:, one], past)
    assert {key.shape[2] for key, _ in past.seen} == {2 * network.tokens * network.reach}, "no more than the context is kept"


@kinds
@pytest.mark.parametrize("which", ["speaker", "finished"])
def test_what_is_to_come_changes_nothing_and_what_was_changes_what_comes(kind: dict[str, object], which: str) -> None:
    network = denoiser(kind)
    noisy, times, speaker, clean = inputs(network)
    later = {"speaker": speaker.clone(), "finished": clean.clone()}
    later[which][:, 3] += 1
    with torch.no_grad():
        before = network(noisy, times, speaker, history=clean)
        after = network(noisy, times, later["speaker"], history=later["finished"])
    reached = 3 if which == "speaker" else 4  # what the speaker did comes a chunk late; what is finished is seen from the next one on
    assert torch.equal(before[:, :reached], after[:, :reached])
    assert all(not torch.equal(before[:, chunk], after[:, chunk]) for chunk in range(reached, CHUNKS))


def test_a_noisy_chunk_sees_no_other_noisy_one_but_finished_ones() -> None:
    network = denoiser(FULL)
    noisy, times, speaker, clean = inputs(network)
    other = noisy.clone()
    other[:, 2] += 1
    with torch.no_grad():
        before, after = (network(given, times, speaker, history=clean) for given in (noisy, other))
    changed = [chunk for chunk in range(CHUNKS) if not torch.equal(before[:, chunk], after[:, chunk])]
    assert changed == [2]


@pytest.mark.parametrize("lag", [0, 5, 20])
def test_a_lag_adds_what_the_speaker_did_so_many_frames_before_once_it_was_heard(lag: int) -> None:
    network = denoiser(PLAIN | {"lags": (lag,), "layers": 0})
    noisy, times, _, clean = inputs(network)
    speaker = torch.zeros(2, CHUNKS, 10, 16)
    with torch.no_grad():
        before = network(noisy, times, speaker, history=clean).flatten(1, 2)
        speaker[:, 2, 4] = 1  # frame 4 of the chunk that is heard in chunk 2: frame 14
        after = network(noisy, times, speaker, history=clean).flatten(1, 2)
    changed = (after - before).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert changed == ([14 + lag] if 14 + lag >= 20 else []), "in chunk 1 nobody has heard of it"


def test_offline_a_lag_is_added_beside_what_is_of_now() -> None:
    network = denoiser({"patch": 5, "lags": (10,), "layers": 0})
    torch.manual_seed(0)
    noisy, times, speaker = torch.randn(1, 3, WINDOW, FEATURES), torch.full((1, 3), 7), torch.zeros(1, 3, WINDOW // 5, 16)
    other = speaker.clone()
    other[:, 1, 9] = 1  # frames 95 to 99
    with torch.no_grad():
        before, after = (network(noisy, times, given).flatten(1, 2) for given in (speaker, other))
    changed = (after - before).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert changed == [*range(95, 100), *range(105, 110)]


DIRECT = config.Model(
    facial=("au", "va"), acoustic=("mfcc",), space="attributes", denoiser="transformer", width=16, layers=2, context=1, heads=4, **FULL
)
KARRAS = {
    "schedule": "karras",
    "prediction": "x0",
    "normalisation": "variance",
    "loss": "squared",
    "times": "log-normal",
    "history": "clean",
    "sampling_steps": 3,
}


def direct(**diffusion: object) -> tuple[DiffusionStage, LatentDiffusion]:
    parts = RawStreams(DIRECT, STREAMS).parts
    kind = DiffusionStage(DIRECT, config.Diffusion.model_validate(KARRAS | diffusion), Source(encoded_streams(parts), 100))
    module = kind.module()
    randomise(module)
    return kind, module


def encoded_streams(parts: dict[str, int]) -> list[StreamSpec]:
    return [StreamSpec(name, "latent", width) for name, width in parts.items()]


def batch_of(kind: DiffusionStage, positions: list[int]) -> dict[str, torch.Tensor]:
    people = clips(2, 100)
    read = {name: people[part][[0 if name.startswith("speaker") else 1] * len(positions)] for name, (_, part) in kind.reads(0).items()}
    drawn = [kind.draw(0, position) for position in positions]
    return read | {name: torch.stack([torch.from_numpy(one[name]) for one in drawn]) for name in drawn[0]}


def test_raw_streams_are_put_side_by_side_and_taken_apart_and_a_speaker_need_not_be_labelled() -> None:
    codec, person = RawStreams(DIRECT, STREAMS), clips(2, 100)
    encoding = codec.encode(person)
    assert codec.parts == TARGETS | {"au": 15, "va": 2, "mfcc": 26} and encoding.shape == (2, 100, codec.width)
    shown = codec.decode(encoding)
    assert all(torch.equal(shown[name], person[name]) for name in TARGETS)
    heard = codec.listen({name: person[name] for name in ("au", "va", "mfcc")})
    assert torch.equal(heard[..., 83:], encoding[..., 83:]) and not heard[..., :83].any()
    assert list(codec.parameters()) == [] and codec.device.type == "cpu"


def test_attributes_and_coefficients_count_alike_and_of_the_speaker_only_streams_are_heard() -> None:
    kind, module = direct()
    assert kind.reads(1) == {
        **{f"speaker {name}": ("b", name) for name in ("au", "va", "mfcc")},
        **{f"listener {name}": ("a", name) for name in TARGETS},
    }
    batch = batch_of(kind, [0, 1])
    loss = module(batch)
    assert loss.shape == (2,) and loss.isfinite().all()
    with torch.no_grad():
        module.deviation[:, :25] *= 2  # errors of attributes count as they are scaled
        module.mean[:, 83:] += 1
    assert not torch.equal(module(batch), loss)


def test_whole_encodings_are_taken_as_well_as_their_parts() -> None:
    kind, module = direct()
    batch, people = batch_of(kind, [3]), clips(2, 100)
    whole = RawStreams(DIRECT, STREAMS).encode(people)
    drawn = {name: tensor for name, tensor in batch.items() if " " not in name}
    torch.testing.assert_close(module(drawn | {"speaker": whole[:1], "listener": whole[1:]}), module(batch))


def test_what_is_drawn_for_an_item_is_of_its_position_alone_and_reaches_the_loss() -> None:
    plain, module = direct()
    base = module(batch_of(plain, [5]))
    for asked, name in (
        ({"history_swap": 0.999}, "shift"),
        ({"history_noise": 1.0}, "history_noise"),
        ({"stream_dropout": 0.999}, "streams"),
        ({"condition_dropout": 0.999}, "hears"),
    ):
        kind, other = direct(**asked)
        drawn = batch_of(kind, [5])
        assert name in drawn and torch.equal(drawn["noise"], batch_of(plain, [5])["noise"])
        assert not torch.equal(other(drawn), base), name
        again = batch_of(kind, [4, 5])
        assert torch.equal(again[name][1], drawn[name][0])


def test_a_generation_does_without_hidden_streams_as_training_did_and_training_does_not_see_what_is_hidden_later() -> None:
    (_, plain), (kind, deaf) = direct(stream_dropout=0.5), direct(stream_dropout=0.5, hidden_streams=["au", "mfcc"])
    for module in (plain, deaf):
        module.set_range(torch.zeros(100, 126), torch.ones(100, 126), torch.full((126,), 0.1), torch.full((126,), 0.3))
    batch = batch_of(kind, [1, 2, 3])
    assert torch.equal(deaf(batch), plain(batch))
    torch.manual_seed(0)
    noise, speaker = torch.randn(1, 2, 2, WINDOW, 83), torch.rand(1, 100, 126)
    silent = speaker.clone()
    silent[..., 83:98] = silent[..., 100:] = 0.1  # the mean: all that is left of va are features 98 and 99
    drawn = deaf.sample(speaker, lambda _: noise)
    torch.testing.assert_close(drawn, plain.sample(silent, lambda _: noise), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn, plain.sample(speaker, lambda _: noise), atol=1e-4)
    made, now = [], Conversation()
    for chunk in range(10):
        here = slice(10 * chunk, 10 * chunk + 10)
        one, now = deaf.react(now, lambda _, here=here: noise.flatten(2, 3)[:, :, here])
        now = deaf.hear(now, speaker[:, here])
        made.append(one)
    torch.testing.assert_close(torch.cat(made, dim=2), drawn, rtol=1e-4, atol=1e-5)


def test_a_swapped_history_is_of_other_moments_and_never_of_later_ones() -> None:
    kind, module = direct(history_swap=0.999)
    drawn = batch_of(kind, list(range(40)))
    assert set(drawn["shift"].tolist()) == set(range(1, 10))
    clean = torch.arange(10.0)[None, :, None, None].expand(1, 10, 10, 83)
    moved = module._history(clean, {"shift": torch.tensor([3])})
    assert moved[0, :, 0, 0].tolist() == [0, 0, 2, 0, 1, 2, 3, 4, 5, 6], "what a chunk is to be does not stand before it"
    for shift in range(1, 10):
        places = module._history(clean, {"shift": torch.tensor([shift])})[0, :, 0, 0]
        assert (places <= torch.arange(10.0)).all()


def test_under_the_past_that_it_drew_itself_a_model_draws_the_same_and_under_another_one_only_what_follows_differs() -> None:
    model = WIDE.model_copy(update=FULL)
    module = randomise(LatentDiffusion(model, config.Diffusion(prediction="x0", sampling_steps=3, history="clean", smoothing=0.6), 100))
    torch.manual_seed(0)
    speaker, draws = torch.randn(1, 100, model.latent), torch.randn(1, 1, 2, WINDOW, model.latent)
    drawn = module.sample(speaker, lambda _: draws)
    torch.testing.assert_close(module.sample(speaker, lambda _: draws, drawn[:, 0]), drawn)
    real = drawn[:, 0].clone()
    real[:, 30:40] += 1
    other = module.sample(speaker, lambda _: draws, real)
    assert torch.equal(other[:, :, :40], module.sample(speaker, lambda _: draws, drawn[:, 0])[:, :, :40])
    assert (other[:, :, 40:50] - drawn[:, :, 40:50]).abs().max() > 1e-3


def test_samples_stay_in_the_range_of_the_training_set_where_the_scale_is_its_variance() -> None:
    _, module = direct()
    low, high = torch.zeros(100, 126), torch.ones(100, 126)
    module.set_range(low, high, torch.full((126,), 0.1), torch.full((126,), 0.3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(30)
    torch.manual_seed(0)
    noise, speaker = torch.randn(1, 2, 2, WINDOW, 83), torch.randn(1, 100, 126)
    drawn = module.sample(speaker, lambda _: noise)
    assert drawn.shape == (1, 2, 100, 83) and drawn.min() >= -1e-6 and drawn.max() <= 1 + 1e-6
    assert drawn.min() < 0.01 and drawn.max() > 0.99


def test_statistics_stay_exact_when_the_weights_are_bfloat16() -> None:
    _, module = direct()
    module.set_range(torch.zeros(100, 126), torch.ones(100, 126), torch.full((126,), 0.123456789), torch.full((126,), 0.3))
    before = module.mean.clone()
    module.bfloat16()
    assert module.mean.dtype == module.deviation.dtype == torch.float32 and torch.equal(module.mean, before)
    with pytest.raises(ValueError, match="mean and standard deviation"):
        module.set_range(torch.zeros(100, 126), torch.ones(100, 126))
