import numpy as np
import pytest
import torch

from reactdiff import config
from reactdiff.generate import Reactor
from reactdiff.model.belfusion import BehaviourVAE
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.perfrdiff import AttributeAutoencoder
from reactdiff.model.raw_streams import RawStreams
from reactdiff.online import Listener
from tests.reactdiff.model.small import MODEL, STREAMS, autoencoder, clips, latent_diffusion, randomise

FRAMES, COUNT, ITEM = 200, 2, ("key", 1)
ONLINE = {"online": True, "width": 16, "layers": 1, "context": 1}
CHUNKED = ONLINE | {"denoiser": "transformer", "chunk": 10, "patch": 5, "lags": (5, 15)}
STEPS = {"prediction": "x0", "sampling_steps": 3}
SMOOTH = {"history": "clean", "smoothing": 0.6}
PEERS = {"perfrdiff": AttributeAutoencoder, "belfusion": BehaviourVAE}
MODELS = ("unet", "transformer", *PEERS, "latents in chunks", "attributes in chunks")


def reactor(which: str) -> Reactor:
    """A model with random weights, which hardly tell one speaker from another: so what they say is made louder."""
    if which in PEERS:
        model = MODEL.model_copy(update=ONLINE | {"family": which})
        codec = randomise(PEERS[which](model, STREAMS))
        return Reactor(codec, randomise(LatentDiffusion(model, config.Diffusion(**STEPS), FRAMES, codec.parts)))
    if which == "attributes in chunks":
        model = MODEL.model_copy(update=CHUNKED | {"space": "attributes"})
        raw = RawStreams(model, STREAMS)
        diffusion = LatentDiffusion(model, config.Diffusion(**STEPS, **SMOOTH), FRAMES, raw.parts)
        return Reactor(raw, randomise(diffusion))
    chunked = which == "latents in chunks"
    model = MODEL.model_copy(update=CHUNKED if chunked else ONLINE | {"denoiser": which})
    codec = autoencoder(online=True, chunk=model.chunk)
    diffusion = latent_diffusion(FRAMES, model, **STEPS, **(SMOOTH if chunked else {}))
    with torch.no_grad():
        latent = codec.encode({name: torch.from_numpy(stream)[None] for name, stream in speaker().items()})[0]
        diffusion.set_range(latent.amin(0, keepdim=True).expand(FRAMES, -1), latent.amax(0, keepdim=True).expand(FRAMES, -1))
        codec.decoder.heads["attributes"][-1].weight.mul_(1000)
    return Reactor(codec, diffusion)


def speaker() -> dict[str, np.ndarray]:
    return {name: stream[0].numpy() for name, stream in clips(1, FRAMES).items()}


def live(model: Reactor, streams: dict[str, np.ndarray], pieces: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """The reactions to a speaker who is heard piece by piece (by default chunk by chunk), each after it was reacted in."""
    listener, made = Listener(model, ITEM, COUNT, seed=7), []
    sizes = pieces or (listener.chunk,) * (FRAMES // listener.chunk)
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        made.append(listener.react())
        listener.hear({name: streams[name][end - size : end] for name in listener.hears})
    return {name: np.concatenate([piece[name] for piece in made], axis=1) for name in made[0]}


def whole(model: Reactor, streams: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reactions to a clip that is there from its first to its last frame."""
    with torch.no_grad():
        latents = model.codec.encode({name: torch.from_numpy(streams[name])[None] for name in model.codec.inputs})
    return {name: array[0] for name, array in model.react(latents.half().numpy(), [ITEM], COUNT, seed=7).items()}


@pytest.mark.parametrize("which", MODELS)
def test_a_live_listener_reacts_as_the_same_model_does_to_the_whole_clip(which: str) -> None:
    model, streams = reactor(which), speaker()
    reactions, at_once = live(model, streams), whole(model, streams)
    assert reactions["attributes"].shape == (COUNT, FRAMES, 25)
    for name, reaction in reactions.items():  # a decoder made loud magnifies what rounding leaves
        np.testing.assert_allclose(reaction, at_once[name], rtol=0, atol=1e-5 * np.abs(at_once[name]).max())


@pytest.mark.parametrize("which", ["unet", "attributes in chunks", "latents in chunks"])
def test_any_number_of_frames_can_be_heard_at_a_time(which: str) -> None:
    model, streams = reactor(which), speaker()
    regular, irregular = live(model, streams), live(model, streams, (1, 48, 2, 0, 99, 7, 43))
    frames = irregular["attributes"].shape[1]
    assert frames == (157 // model.diffusion.chunk + 1) * model.diffusion.chunk, "reactions to 157 frames, and those before anything"
    expected = regular["attributes"][:, :frames]
    np.testing.assert_allclose(irregular["attributes"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("which", MODELS)
def test_changing_what_comes_changes_nothing_before_the_chunk_after_it_bit_for_bit(which: str) -> None:
    model, streams = reactor(which), speaker()
    chunk = model.diffusion.chunk
    for react in (live, whole):
        before = react(model, streams)["attributes"]
        for first in (100, 100 + chunk - 1):  # the first and the last frame of a chunk
            later = {name: np.concatenate((stream[:first], 9 * stream[: first - 1 : -1] ** 2)) for name, stream in streams.items()}
            after = react(model, later)["attributes"]
            assert np.array_equal(before[:, : 100 + chunk], after[:, : 100 + chunk])
            assert np.abs(before[:, 100 + chunk : 100 + 2 * chunk] - after[:, 100 + chunk : 100 + 2 * chunk]).max() > 1e-4


def test_what_is_heard_is_checked() -> None:
    listener = Listener(reactor("attributes in chunks"), ITEM, 1, 0)
    assert listener.hears == ("au", "fer", "va", "mfcc"), "nobody can tell a live speaker's attributes"
    heard = {name: stream[:10] for name, stream in speaker().items()}
    with pytest.raises(ValueError, match=r"mfcc is lacking"):
        listener.hear({name: stream for name, stream in heard.items() if name != "mfcc"})
    with pytest.raises(ValueError, match=r"equally many frames"):
        listener.hear(heard | {"mfcc": heard["mfcc"][:9]})
    listener.react()
    assert listener.react()["attributes"].shape == (1, 0, 25)


@pytest.mark.parametrize("bad", [float("nan"), 1e5])
@pytest.mark.parametrize("which", ["unet", "latents in chunks", "attributes in chunks"])
def test_a_frame_that_is_not_finite_is_refused_and_leaves_nothing_behind(which: str, bad: float) -> None:
    model, streams = reactor(which), speaker()
    listener = Listener(model, ITEM, COUNT, seed=7)
    made = []
    for first in range(0, FRAMES, listener.chunk):
        made.append(listener.react()["attributes"])
        heard = {name: streams[name][first : first + listener.chunk].astype(np.float32) for name in listener.hears}
        broken = heard | {"mfcc": heard["mfcc"].copy()}
        broken["mfcc"][3, 1] = bad
        with pytest.raises(ValueError, match=r"mfcc has .* in frame 3, feature 1"):
            listener.hear(broken)
        listener.hear(heard)
    assert np.array_equal(np.concatenate(made, axis=1), live(model, streams)["attributes"])


def test_streams_of_each_other_s_width_are_refused() -> None:
    heard = {name: stream[:10] for name, stream in speaker().items()}
    for which in ("attributes in chunks", "latents in chunks"):
        listener = Listener(reactor(which), ITEM, 1, 0)
        with pytest.raises(ValueError, match=r"au is of shape \(10, 8\).*\(frames, 15\)"):
            listener.hear(heard | {"au": heard["fer"], "fer": heard["au"]})
        with pytest.raises(ValueError, match=r"au is of shape \(10, 10\)"):
            listener.hear(heard | {"au": heard["au"][:, :10], "fer": np.ones((10, 13), np.float16)})  # as wide as both together


def test_a_stream_that_is_hidden_may_have_any_values() -> None:
    model = MODEL.model_copy(update=CHUNKED | {"space": "attributes"})
    raw = RawStreams(model, STREAMS)
    diffusion = config.Diffusion(**STEPS, stream_dropout=0.2, hidden_streams=("mfcc",))
    deaf = Reactor(raw, randomise(LatentDiffusion(model, diffusion, FRAMES, raw.parts)))
    streams = speaker()
    dead = streams | {"mfcc": np.full_like(streams["mfcc"], np.nan)}
    assert np.array_equal(live(deaf, dead)["attributes"], live(deaf, streams)["attributes"])


def test_a_model_that_needs_the_whole_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"whole clip.*model\.online=true"):
        Listener(Reactor(autoencoder(), latent_diffusion()), ITEM, 1, 0)
