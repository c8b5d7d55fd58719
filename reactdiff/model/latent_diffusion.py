"""Stage 2: diffusion of the listener's latents, given the speaker's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW, windows_of
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import SAMPLERS, Noise
from reactdiff.model.perfrdiff import AttributeAutoencoder, SpeakerTokens, WindowDenoiser
from reactdiff.model.transformer import FrameTransformer, Past
from reactdiff.model.unet import GROUPS, UNet

START = Past()


@dataclass(frozen=True)
class Conversation:
    """Where an online generation stands: one window follows another, and none is ever changed.

    Attributes:
        window: the next one.
        heard: the speaker's last window, normalised, (batch, 50, latent); None before the first.
        past: what a transformer remembers of the windows before.
    """

    window: int = 0
    heard: Tensor | None = None
    past: Past = START


class LatentDiffusion(nn.Module):
    """A denoiser of the listener's windows under the speaker's.

    Latents come in and go out raw. Inside, each feature lies in [-1, 1] over the training set. Offline, a window of the
    listener knows the same window of the speaker (a transformer: its neighbours too); online, the one before, zeros at first.

    Args:
        model: family, denoiser and widths.
        diffusion: process, prediction, sampler and normalisation.
        frames: length of a clip; latents of any other multiple of 50 frames are taken too, where the range is per feature.
        encoding: features of a frame that stage 1 makes; by default `model.latent`.

    Attributes:
        target: how many of them are denoised, the first ones.
        minimum: smallest latent of the training set, float32, (1, encoding) or (frames, encoding) as `diffusion.normalisation` says.
        maximum: largest, of the same shape.

    Raises:
        ValueError: if the frames do not divide into windows, or a width does not suit the network.
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, model: config.Model, diffusion: config.Diffusion, frames: int, encoding: int | None = None):
        super().__init__()
        windows_of(frames)
        width = encoding or model.latent
        self.process = Process(diffusion)
        self.sampler, self.sampling_steps, self.guidance = SAMPLERS[diffusion.sampler], diffusion.sampling_steps, diffusion.guidance
        self.online, self.target, self.squared = model.online, width, False
        self.condition: nn.Module
        self.denoiser: nn.Module
        if model.family == "perfrdiff":
            # Most attributes are 0 most of the time: an absolute error would be least for never showing them.
            self.target, self.squared = AttributeAutoencoder.target, True
            self.condition, self.denoiser = SpeakerTokens(model, width - sum(TARGETS.values()) - model.latent), WindowDenoiser(model)
        elif model.denoiser == "transformer":
            self.condition, self.denoiser = nn.Linear(width, model.width), FrameTransformer(model, width)
        else:
            self.condition = _projector(model)
            self.denoiser = UNet(WINDOW, model.latent, model.channels, model.multipliers, model.condition, model.blocks)
        # A transformer sees all windows of a clip at once; the others denoise each by itself.
        self.joint = isinstance(self.denoiser, FrameTransformer)
        rows = frames if diffusion.normalisation == "frame" else 1
        self.register_buffer("minimum", torch.full((rows, width), -1.0))  # on "meta" a minus would load torch's compiler
        self.register_buffer("maximum", torch.ones(rows, width))

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Takes the range of the training set's latents, both (frames, encoding); per feature, it is reduced over the frames.

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

    def normalise(self, latent: Tensor, first: int = 0) -> Tensor:
        """Raw latents (..., frames, features) to [-1, 1] over the training set, float32; a constant feature becomes 0.

        Args:
            latent: the first `features` of the encoding, which begin at frame `first` of their clip.
            first: counts where the range is per frame.

        Raises:
            ValueError: if the range is per frame and ends before these do.
        """
        centre, radius = self._centre_and_radius(latent, first)
        return (latent.float() - centre) / radius

    def denormalise(self, normalised: Tensor, first: int = 0) -> Tensor:
        """The inverse of `normalise`, (..., frames, features)."""
        centre, radius = self._centre_and_radius(normalised, first)
        return normalised.float() * radius + centre

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 L1 (PerFRDiff: 10 MSE) of what the denoiser predicts, weighted over diffusion times, for each item, in float32.

        Args:
            batch: raw latents `speaker` and `listener` (items, frames, encoding), `noise` (items, windows, 50, target), `times`
                (items, windows), and `hears` (items, windows), 0 where the speaker is hidden, if `diffusion.condition_dropout` is on.

        Returns:
            (items,); an empty batch has an empty loss, through which zeros flow back.
        """
        clean = _windows(self.normalise(batch["listener"]))[..., : self.target]
        heard, times = self._heard(batch["speaker"]), batch["times"]
        if "hears" in batch:
            hears = batch["hears"][:, :1] if self.joint else batch["hears"]  # all windows of a clip see each other
            heard = heard * hears[:, :, None, None]
        if self.joint and not self.online:
            times = times[:, :1].expand_as(times)  # as in sampling
        noisy = self.process.q_sample(clean, batch["noise"], times)
        prediction = self._denoise(noisy, times, self._condition(heard))
        difference = prediction - self.process.target(clean, batch["noise"], times)
        error = (difference.square() if self.squared else difference.abs()).mean((2, 3))
        return 10 * (self.process.weight(times) * error).mean(1)

    forward = loss

    @torch.no_grad()
    def predict_clean(self, speaker: Tensor, listener: Tensor, noise: Tensor, time: int) -> Tensor:
        """What the denoiser makes of the listener at one time of the process, in a single call, clamped as a sampler does.

        Args:
            speaker: raw latents (items, frames, encoding).
            listener: raw latents of the same shape.
            noise: what they are mixed with, (items, windows, 50, target), standard normal.
            time: the step.

        Returns:
            Raw latents of the listener, (items, frames, target).
        """
        clean = _windows(self.normalise(listener))[..., : self.target]
        times = torch.full(clean.shape[:2], time, device=clean.device)
        noisy = self.process.q_sample(clean, noise, times)
        prediction = self._denoise(noisy, times, self._condition(self._heard(speaker)))
        return self.denormalise(self.process.clean(noisy, prediction, times).clamp(-1, 1).flatten(1, 2))

    @torch.no_grad()
    def sample(self, speaker: Tensor, noise: Noise) -> Tensor:
        """K reactions to each speaker, all denoised in one batch under one encoding of the condition.

        Args:
            speaker: raw latents (batch, frames, encoding).
            noise: number of the draw -> (batch, K, windows, 50, target), standard normal; only DDPM asks for more than number 0.

        Returns:
            Raw latents of the listener, (batch, K, frames, target).
        """
        batch, samples, windows = noise(0).shape[:3]
        heard = self._heard(speaker).repeat_interleave(samples, dim=0)

        def start(number: int, windows: slice = slice(None)) -> Tensor:
            return noise(number)[:, :, windows].flatten(0, 1)

        if self.online and self.joint:
            past, made = START, []
            for window in range(windows):
                one = slice(window, window + 1)
                clean, past = self._draw(heard[:, one], partial(start, windows=one), past)
                made.append(clean)
            clean = torch.cat(made, dim=1)
        else:
            clean, _ = self._draw(heard, start, START)
        return self.denormalise(clean.reshape(batch, samples, windows * WINDOW, -1))

    @torch.no_grad()
    def react(self, now: Conversation, noise: Noise) -> tuple[Tensor, Conversation]:
        """Online: K reactions to what was heard so far, for the next window. The speaker's own comes afterwards, to `hear`.

        Args:
            now: where the conversation stands.
            noise: number of the draw -> (batch, K, 50, target), standard normal.

        Returns:
            Raw latents (batch, K, 50, target), and the conversation after them.
        """
        batch, samples = noise(0).shape[:2]
        like = self.minimum.new_zeros(batch, WINDOW, self.minimum.shape[1])
        heard = (like if now.heard is None else now.heard).repeat_interleave(samples, dim=0)[:, None]
        clean, past = self._draw(heard, lambda number: noise(number).flatten(0, 1)[:, None], now.past)
        raw = self.denormalise(clean.reshape(batch, samples, WINDOW, -1), now.window * WINDOW)
        return raw, Conversation(now.window + 1, None, past)

    def hear(self, now: Conversation, speaker: Tensor) -> Conversation:
        """The conversation after the speaker's raw latents (batch, 50, encoding) of the window that was just reacted in."""
        return Conversation(now.window, self.normalise(speaker, (now.window - 1) * WINDOW), now.past)

    def _draw(self, heard: Tensor, noise: Noise, past: Past) -> tuple[Tensor, Past]:
        """Clean windows (batch, windows, 50, target) under heard ones (batch, windows, 50, encoding), and the past after them."""
        guided = self.guidance != 1
        condition = self._condition(torch.cat((heard, torch.zeros_like(heard))) if guided else heard)

        def twice(x: Tensor) -> Tensor:
            return torch.cat((x, x)) if guided else x

        def predict(noisy: Tensor, time: float) -> Tensor:
            times = torch.full(noisy.shape[:2], time, device=noisy.device)
            answer = self._denoise(twice(noisy), twice(times), condition, past)
            if not guided:
                return answer
            hearing, deaf = answer.chunk(2)
            return deaf + self.guidance * (hearing - deaf)

        clean = self.sampler(self.process, predict, noise, self.sampling_steps)
        if isinstance(self.denoiser, FrameTransformer) and self.online:
            past = self.denoiser.remember(twice(clean).to(self._dtype), condition, past)
        return clean, past

    def _heard(self, speaker: Tensor) -> Tensor:
        """What each window may know of the speaker: raw latents (items, frames, encoding) to normalised windows."""
        windows = _windows(self.normalise(speaker))
        return torch.cat((torch.zeros_like(windows[:, :1]), windows[:, :-1]), dim=1) if self.online else windows

    def _condition(self, heard: Tensor) -> Tensor:
        """Normalised windows (items, windows, 50, encoding) to the condition of every window, (items, windows, ...)."""
        heard = heard.to(self._dtype)
        return self.condition(heard) if self.joint else self.condition(heard.flatten(0, 1)).unflatten(0, heard.shape[:2])

    def _denoise(self, noisy: Tensor, times: Tensor, condition: Tensor, past: Past | None = None) -> Tensor:
        """The denoiser in the weights' precision; its answer in float32, where the process is computed."""
        noisy = noisy.to(self._dtype)
        if self.joint:
            return self.denoiser(noisy, times, condition, past).float()
        return self.denoiser(*(each.flatten(0, 1) for each in (noisy, times, condition))).unflatten(0, noisy.shape[:2]).float()

    def _centre_and_radius(self, latent: Tensor, first: int) -> tuple[Tensor, Tensor]:
        (frames, features), rows = latent.shape[-2:], len(self.minimum)
        if rows != 1 and rows < first + frames:
            raise ValueError(
                f"latents of {first + frames} frames cannot be normalised per frame by the range of {rows} frames; "
                "train with diffusion.normalisation=feature to generate any length"
            )
        these = slice(0, 1) if rows == 1 else slice(first, first + frames)
        minimum, maximum = self.minimum[these, :features], self.maximum[these, :features]
        centre, radius = (maximum + minimum) / 2, (maximum - minimum) / 2
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
    """(items, frames, features) -> (items, windows, 50, features)."""
    return latent.unflatten(1, (windows_of(latent.shape[1]), WINDOW))
