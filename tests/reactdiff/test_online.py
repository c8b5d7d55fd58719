import numpy as np
import pytest
import torch

from reactdiff import config
from reactdiff.generate import Reactor
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.perfrdiff import AttributeAutoencoder
from reactdiff.online import Listener
from tests.reactdiff.model.small import MODEL, STREAMS, autoencoder, clips, latent_diffusion, randomise

FRAMES, COUNT, ITEM = 200, 2, ("key", 1)
ONLINE = {"online": True, "width": 16, "layers": 1, "context": 1}


def reactor(family: str) -> Reactor:
    if family == "perfrdiff":
        model = MODEL.model_copy(update=ONLINE | {"family": "perfrdiff"})
        codec = randomise(AttributeAutoencoder(model, STREAMS))
        return Reactor(codec, randomise(LatentDiffusion(model, config.Diffusion(prediction="x0", sampling_steps=3), FRAMES, codec.width)))
    model = MODEL.model_copy(update=ONLINE | {"denoiser": family})
    codec, diffusion = autoencoder(online=True), latent_diffusion(FRAMES, model, prediction="x0", sampling_steps=3)
    with torch.no_grad():  # random weights hardly tell one latent from another, so look closely
        latent = codec.encode({name: torch.from_numpy(stream)[None] for name, stream in speaker().items()})[0]
        diffusion.set_range(latent.amin(0, keepdim=True).expand(FRAMES, -1), latent.amax(0, keepdim=True).expand(FRAMES, -1))
        codec.decoder.heads["attributes"][-1].weight.mul_(1000)
    return Reactor(codec, diffusion)


def speaker() -> dict[str, np.ndarray]:
    return {name: stream[0].numpy() for name, stream in clips(1, FRAMES).items()}


def live(model: Reactor, streams: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reactions to a speaker who is heard window by window, each window after it was reacted in."""
    listener, windows = Listener(model, ITEM, COUNT, seed=7), []
    for start in range(0, FRAMES, 50):
        windows.append(listener.react())
        listener.hear({name: streams[name][start : start + 50] for name in model.codec.inputs})
    return {name: np.concatenate([window[name] for window in windows], axis=1) for name in windows[0]}


@pytest.mark.parametrize("family", ["unet", "transformer", "perfrdiff"])
def test_a_live_listener_reacts_as_the_same_model_does_to_the_whole_clip(family: str) -> None:
    model, streams = reactor(family), speaker()
    with torch.no_grad():
        latents = model.codec.encode({name: torch.from_numpy(streams[name])[None] for name in model.codec.inputs})
    whole = model.react(latents.half().numpy(), [ITEM], COUNT, seed=7)
    reactions = live(model, streams)
    assert reactions["attributes"].shape == (COUNT, FRAMES, 25)
    for name, reaction in reactions.items():
        np.testing.assert_allclose(reaction, whole[name][0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["unet", "transformer", "perfrdiff"])
def test_changing_what_comes_changes_nothing_before(family: str) -> None:
    model, streams = reactor(family), speaker()
    later = {name: np.concatenate((stream[:100], 9 * stream[:99:-1] ** 2)) for name, stream in streams.items()}
    before, after = (live(model, given)["attributes"] for given in (streams, later))
    assert np.array_equal(before[:, :150], after[:, :150])
    assert np.abs(before[:, 150:] - after[:, 150:]).max() > 1e-4


def test_reacting_and_hearing_take_turns() -> None:
    listener, window = Listener(reactor("unet"), ITEM, 1, 0), {name: stream[:50] for name, stream in speaker().items()}
    with pytest.raises(RuntimeError, match="take turns"):
        listener.hear(window)
    listener.react()
    with pytest.raises(RuntimeError, match="take turns"):
        listener.react()
    listener.hear(window)
    listener.react()


def test_a_model_that_needs_the_whole_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"whole clip.*model\.online=true"):
        Listener(Reactor(autoencoder(), latent_diffusion()), ITEM, 1, 0)
