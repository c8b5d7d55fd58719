"""Stage 2: diffusion of the listener's latent windows, given the speaker's."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import WINDOW, windows_of
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import ddim
from reactdiff.model.unet import GROUPS, UNet


class LatentDiffusion(nn.Module):
    """A UNet that denoises each window of the listener under the same window of the speaker.

    Latents come in and go out raw. Inside, each feature lies in [-1, 1] over the training set.

    Args:
        model: widths of latent, condition and UNet.
        diffusion: process, prediction, sampler and normalisation.
        frames: length of a clip; latents of any other multiple of 50 frames are taken too, where the range is per feature.

    Attributes:
        minimum: smallest latent of the training set, float32, (1, latent) or (frames, latent) as `diffusion.normalisation` says.
        maximum: largest, of the same shape.

    Raises:
        ValueError: if the frames do not divide into windows, or a width does not suit the network.
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, model: config.Model, diffusion: config.Diffusion, frames: int):
        super().__init__()
        windows_of(frames)
        self.process = Process(diffusion)
        self.sampling_steps = diffusion.sampling_steps
        self.condition = _projector(model)
        self.denoiser = UNet(WINDOW, model.latent, model.channels, model.multipliers, model.condition)
        rows = frames if diffusion.normalisation == "frame" else 1
        self.register_buffer("minimum", -torch.ones(rows, model.latent))
        self.register_buffer("maximum", torch.ones(rows, model.latent))

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Takes the range of the training set's latents, both (frames, latent); per feature, it is reduced over the frames.

        Raises:
            ValueError: if the shape is not that of this model's latents, or a minimum is not below or at its maximum.
        """
        if not (minimum <= maximum).all():
            raise ValueError("the latents' minimum must be at most their maximum, and neither may be NaN; encode the training set again")
        if len(self.minimum) == 1:
            minimum, maximum = minimum.amin(0, keepdim=True), maximum.amax(0, keepdim=True)
        if minimum.shape != self.minimum.shape or maximum.shape != self.maximum.shape:
            raise ValueError(
                f"the latents' range is {tuple(minimum.shape)} (frames, features), but this model needs {tuple(self.minimum.shape)}; "
                "use the statistics of the latents it is trained on"
            )
        self.minimum.copy_(minimum)
        self.maximum.copy_(maximum)

    def normalise(self, latent: Tensor) -> Tensor:
        """Raw latents (..., frames, latent) to [-1, 1] over the training set, float32; a constant feature becomes 0."""
        centre, radius = self._centre_and_radius(latent)
        return (latent.float() - centre) / radius

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`, (..., frames, latent)."""
        centre, radius = self._centre_and_radius(normalised)
        return normalised.float() * radius + centre

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 L1 between what the denoiser predicts (epsilon or x_0) and its target, for each item, in float32.

        Args:
            batch: raw latents `speaker` and `listener` (items, frames, latent), `noise` (items, windows, 50, latent) and
                `times` (items, windows).

        Returns:
            (items,); an empty batch has an empty loss, through which zeros flow back.
        """
        clean = _windows(self.normalise(batch["listener"]))
        noise, times = batch["noise"].flatten(0, 1), batch["times"].flatten()
        noisy = self.process.q_sample(clean, noise, times)
        prediction = self._denoise(noisy, times, self._condition(batch["speaker"]))
        error = (prediction - self.process.target(clean, noise, times)).abs()
        return 10 * error.unflatten(0, batch["times"].shape).mean((1, 2, 3))

    forward = loss

    @torch.no_grad()
    def sample(self, speaker: Tensor, noise: Tensor) -> Tensor:
        """K reactions to each speaker, all denoised in one batch under one encoding of the condition.

        Args:
            speaker: raw latents (batch, frames, latent).
            noise: (batch, K, windows, 50, latent), standard normal.

        Returns:
            Raw latents of the listener, (batch, K, frames, latent).
        """
        batch, samples, windows = noise.shape[:3]
        condition = self._condition(speaker).unflatten(0, (batch, 1, windows)).expand(-1, samples, -1, -1).flatten(0, 2)

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            return self._denoise(noisy, times, condition)

        clean = ddim(self.process, predict, noise.flatten(0, 2), self.sampling_steps)
        return self.denormalise(clean.reshape(batch, samples, windows * WINDOW, -1))

    def _condition(self, speaker: Tensor) -> Tensor:
        """Raw latents (batch, frames, latent) to the condition of every window, (batch * windows, condition)."""
        return self.condition(_windows(self.normalise(speaker)).to(self._dtype))

    def _denoise(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The denoiser in the weights' precision; its answer in float32, where the process is computed."""
        return self.denoiser(noisy.to(self._dtype), times, condition).float()

    def _centre_and_radius(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        rows, frames = len(self.minimum), latent.shape[-2]
        if rows not in (1, frames):
            raise ValueError(
                f"latents of {frames} frames cannot be normalised per frame by the range of {rows} frames; "
                "train with diffusion.normalisation=feature to generate any length"
            )
        centre, radius = (self.maximum + self.minimum) / 2, (self.maximum - self.minimum) / 2
        # A feature that varies less than float32 can tell is constant: dividing by its range would only blow up rounding.
        varies = radius > torch.finfo(radius.dtype).eps * centre.abs()
        return centre, torch.where(varies, radius, 1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the range with the module, but keeps it float32 when the weights change precision (`.bfloat16()`)."""
        exact = self.minimum, self.maximum
        super()._apply(fn, recurse)
        if self.minimum.dtype != exact[0].dtype:
            self.minimum, self.maximum = (bound.to(self.minimum.device) for bound in exact)
        return self


def _projector(model: config.Model) -> nn.Sequential:
    """A speaker window (batch, 50, latent), flattened frame by frame, to its condition (batch, condition)."""
    if model.condition <= GROUPS:
        raise ValueError(
            f"model.condition is {model.condition}: in {GROUPS} groups of one feature each, normalisation leaves nothing of the speaker; "
            f"make it at least {2 * GROUPS}"
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(WINDOW * model.latent, model.condition), nn.GroupNorm(GROUPS, model.condition), nn.SiLU())


def _windows(latent: Tensor) -> Tensor:
    """(batch, frames, latent) -> (batch * windows, 50, latent)."""
    return latent.unflatten(1, (windows_of(latent.shape[1]), WINDOW)).flatten(0, 1)
