"""Small models and batches for tests, with weights that are nowhere zero."""

import numpy as np
import torch
from torch import nn

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW
from reactdiff.data.keyed import normal
from reactdiff.data.sample import StreamSpec
from reactdiff.diffusion.noise import training_noise, training_times
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.latent_diffusion import LatentDiffusion

STREAMS = [
    StreamSpec("au", "facial", 15),
    StreamSpec("fer", "facial", 8),
    StreamSpec("va", "facial", 2),
    StreamSpec("mfcc", "acoustic", 26),
]
LATENT = 8
MODEL = config.Model(acoustic=("mfcc",), hidden=16, latent=LATENT, channels=32, multipliers=(1, 2), condition=64)


def randomise(module: nn.Module) -> nn.Module:
    """Weights that are nowhere zero, so that no branch is silent, and small enough that nothing blows up."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(normal(tuple(parameter.shape), "test", name)) / max(1, parameter[0].numel()) ** 0.5)
    return module.eval()


def autoencoder(**model: object) -> Autoencoder:
    return randomise(Autoencoder(MODEL.model_copy(update=model), STREAMS))


def latent_diffusion(frames: int = 100, model: config.Model = MODEL, **diffusion: object) -> LatentDiffusion:
    return randomise(LatentDiffusion(model, config.Diffusion(**diffusion), frames))


def clips(items: int, frames: int) -> dict[str, torch.Tensor]:
    """A batch of stage 1: half-precision streams, full-precision targets."""
    widths = {stream.name: stream.width for stream in STREAMS}
    streams = {name: torch.from_numpy(normal((items, frames, width), "test", name)).half() for name, width in widths.items()}
    return streams | {name: torch.from_numpy(normal((items, frames, width), "test", name)) for name, width in TARGETS.items()}


def latents(items: int, frames: int) -> dict[str, torch.Tensor]:
    """A batch of stage 2: half-precision latents, with the noise and times of positions 0, 1, ..."""
    windows = frames // WINDOW
    drawn = [(training_noise(0, position, windows, LATENT), training_times(0, position, windows, 20)) for position in range(items)]
    noise = np.stack([noise for noise, _ in drawn]) if drawn else np.empty((0, windows, WINDOW, LATENT), np.float32)
    times = np.stack([times for _, times in drawn]) if drawn else np.empty((0, windows), np.int64)
    raw = {name: torch.from_numpy(normal((items, frames, LATENT), "test", name)).half() for name in ("speaker", "listener")}
    return raw | {"noise": torch.from_numpy(noise), "times": torch.from_numpy(times)}


def assert_windows_are_denoised_by_themselves(module: nn.Module, noisy: torch.Tensor, times: torch.Tensor, speaker: torch.Tensor) -> None:
    """Each of three windows under its own time and speaker, and under no other window's."""
    output = module(noisy, times, speaker)
    assert output.shape == noisy.shape
    for changed in (module(noisy + 1, times, speaker), module(noisy, times + 1, speaker), module(noisy, times, speaker.roll(1, 0))):
        assert not torch.allclose(changed, output, rtol=0, atol=1e-5)
    torch.testing.assert_close(module(noisy[1:2], times[1:2], speaker[1:2]), output[1:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(noisy, times.float(), speaker), output)
    assert not torch.allclose(module(noisy, times + 0.5, speaker), output, rtol=0, atol=1e-5)


def assert_empty_batch_flows_back_as_zeros(module: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    loss = module.train()(batch)
    assert loss.shape == (0,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())
