"""Stage 2: diffusion of the listener's latents, or of its attributes themselves, given the speaker's."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW, windows_of
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import SAMPLERS, Noise
from reactdiff.diffusion.smoothing import smooth
from reactdiff.model.belfusion import WindowMLP, speaker_window
from reactdiff.model.codec import LATENT
from reactdiff.model.perfrdiff import AttributeAutoencoder, SpeakerTokens, WindowDenoiser
from reactdiff.model.scale import Scaled
from reactdiff.model.transformer import FrameTransformer, Past
from reactdiff.model.unet import GROUPS, UNet


@dataclass(frozen=True)
class Conversation:
    """Where an online generation stands: one chunk follows another, and none is ever changed.

    Attributes:
        chunk: the next one.
        heard: the speaker's last chunk, normalised, (batch, frames, features); None before the first.
        past: what a transformer, and one that guides it, remember of the chunks before; empty before the first.
    """

    chunk: int = 0
    heard: Tensor | None = None
    past: tuple[Past, ...] = ()


class LatentDiffusion(Scaled):
    """A denoiser of the listener's windows under the speaker's; online of its chunks, which may be shorter.

    Encodings come in and go out raw. Inside, each feature lies in [-1, 1] over the training set, or has variance 1 there. Offline, a window
    of the listener knows the same window of the speaker (a transformer: its neighbours too); online, a chunk knows the one before, zeros at
    first. With `model.space=attributes` an encoding is attributes, coefficients and streams as they are: of the listener the first two
    are denoised, and of the speaker the streams are heard.

    Args:
        model: family, denoiser and widths.
        diffusion: process, prediction, sampler and normalisation.
        frames: length of a clip; encodings of any other multiple of 50 frames are taken too, where the range is per feature.
        parts: of an encoding, and the features of each; by default one latent.

    Attributes:
        target: how many features are denoised, the first ones.
        chunk: frames that have one diffusion time.
        weaker: an earlier state of the same model, if it guides (autoguidance; Karras et al., 2024). It is no part of this module.

    Raises:
        ValueError: if the frames do not divide into windows, or a width does not suit the network.
    """

    def __init__(self, model: config.Model, diffusion: config.Diffusion, frames: int, parts: Mapping[str, int] | None = None):
        windows_of(frames)
        width = sum((parts or {LATENT: model.latent}).values())
        super().__init__(diffusion.normalisation, frames, width)
        self.parts = dict(parts or {LATENT: model.latent})
        self.process = Process(diffusion)
        self.sampler, self.sampling_steps, self.guidance = SAMPLERS[diffusion.sampler], diffusion.sampling_steps, diffusion.guidance
        self.smoothing, self.autoguidance = diffusion.smoothing, diffusion.autoguidance
        self.hidden = frozenset(diffusion.hidden_streams)
        self.weaker: tuple[LatentDiffusion, ...] = ()
        self.online, self.target, self.squared = model.online, width, diffusion.loss == "squared"
        self.chunk, self.clean_history = model.chunk_frames, model.online and diffusion.history == "clean"
        self.direct, heard = model.space == "attributes", width
        if self.direct:
            self.target = sum(TARGETS.values())
            heard = width - self.target
        self.condition: nn.Module
        self.denoiser: nn.Module
        if model.family == "perfrdiff":
            # Most attributes are 0 most of the time: an absolute error would be least for never showing them.
            self.target, self.squared = AttributeAutoencoder.target, True
            self.condition, self.denoiser = SpeakerTokens(model, width - sum(TARGETS.values()) - model.latent), WindowDenoiser(model)
        elif model.family == "belfusion":
            self.condition, self.denoiser = speaker_window(model), WindowMLP(model)
        elif model.denoiser == "transformer":
            self.condition, self.denoiser = nn.Linear(model.patch * heard, model.width), FrameTransformer(model, self.target)
        else:
            self.condition = _projector(model)
            self.denoiser = UNet(WINDOW, model.latent, model.channels, model.multipliers, model.condition, model.blocks)
        # A transformer sees all chunks of a clip at once; the others denoise each by itself.
        self.joint = isinstance(self.denoiser, FrameTransformer)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 times the mean error of what the denoiser predicts, weighted over diffusion times, for each item, in float32.

        Args:
            batch: raw encodings `speaker` and `listener` (items, frames, encoding), or the parts of them that are used, as
                `speaker PART`; `noise` (items, windows, 50, target); `times` (items, chunks). As the configuration asks: `hears` (items,
                chunks), 0 where the speaker is hidden; `streams` (items, streams), 0 where a stream is; `shift` (items,), chunks by which
                an item's history is that of other moments; `history_noise`, of the shape of `noise`, to be added to it.

        Returns:
            (items,); an empty batch has an empty loss, through which zeros flow back.
        """
        clean = self._finished(self._whole(batch, "listener"))
        heard, times = self._heard(self._whole(batch, "speaker")), batch["times"]
        if "hears" in batch:
            hears = batch["hears"][:, :1] if self.joint else batch["hears"]  # all chunks of a clip see each other
            heard = heard * hears[:, :, None, None]
        if "streams" in batch:
            heard = heard * self._shown(batch["streams"])[:, None, None]
        if self.joint and not self.online:
            times = times[:, :1].expand_as(times)  # as in sampling
        noise = self._chunks(batch["noise"].flatten(1, 2))
        noisy = self.process.q_sample(clean, noise, times)
        history = self._history(clean, batch) if self.clean_history else None
        prediction = self._denoise(noisy, times, self._condition(heard), history=history)
        difference = prediction - self.process.target(clean, noise, times)
        error = difference.square() if self.squared else difference.abs()
        if self.direct:  # attributes and coefficients count alike, however many they are
            error = torch.stack([part.mean((2, 3)) for part in error.split(tuple(TARGETS.values()), dim=-1)]).mean(0)
        else:
            error = error.mean((2, 3))
        return 10 * (self.process.weight(times) * error).mean(1)

    forward = loss

    @torch.no_grad()
    def predict_clean(self, speaker: Tensor, listener: Tensor, noise: Tensor, time: int) -> Tensor:
        """What the denoiser makes of the listener at one time of the process, in a single call, clamped as a sampler does.

        Args:
            speaker: raw encodings (items, frames, encoding).
            listener: raw encodings of the same shape.
            noise: what they are mixed with, (items, windows, 50, target), standard normal.
            time: the step.

        Returns:
            Raw encodings of the listener, (items, frames, target).
        """
        clean = self._finished(listener)
        times = torch.full(clean.shape[:2], time, device=clean.device)
        noisy = self.process.q_sample(clean, self._chunks(noise.flatten(1, 2)), times)
        history = clean if self.clean_history else None
        prediction = self._denoise(noisy, times, self._condition(self._heard(speaker)), history=history)
        return self.denormalise(self.process.clean(noisy, prediction, times).clamp(*self.limits(self.target)).flatten(1, 2))

    @torch.no_grad()
    def sample(self, speaker: Tensor, noise: Noise, listener: Tensor | None = None) -> Tensor:
        """K reactions to each speaker, all denoised in one batch under one encoding of the condition.

        Args:
            speaker: raw encodings (batch, frames, encoding).
            noise: number of the draw -> (batch, K, windows, 50, target), standard normal; only DDPM asks for more than number 0.
            listener: raw encodings of real listeners, (batch, frames, encoding), under whose past an online transformer draws each chunk,
                as in training, and not under what it has drawn before (teacher forcing).

        Returns:
            Raw encodings of the listener, (batch, K, frames, target).
        """
        batch, samples, windows = noise(0).shape[:3]
        heard = self._without_hidden(self._heard(speaker)).repeat_interleave(samples, dim=0)

        def start(number: int, chunks: slice = slice(None)) -> Tensor:
            return self._chunks(noise(number).flatten(0, 1).flatten(1, 2))[:, chunks]

        if self.online and self.joint:
            past, made = tuple[Past, ...](), []
            real = None if listener is None else self._finished(listener).repeat_interleave(samples, dim=0)
            for chunk in range(heard.shape[1]):
                one = slice(chunk, chunk + 1)
                clean, past = self._draw(heard[:, one], partial(start, chunks=one), past, None if real is None else real[:, one])
                made.append(clean)
            clean = torch.cat(made, dim=1)
        else:
            assert listener is None, "only online transformers have a past"
            clean, _ = self._draw(heard, start, ())
        return self.denormalise(clean.reshape(batch, samples, windows * WINDOW, -1))

    @torch.no_grad()
    def react(self, now: Conversation, noise: Noise) -> tuple[Tensor, Conversation]:
        """Online: K reactions to what was heard so far, for the next chunk. The speaker's own comes afterwards, to `hear`.

        Args:
            now: where the conversation stands.
            noise: number of the draw -> (batch, K, chunk, target), standard normal.

        Returns:
            Raw encodings (batch, K, chunk, target), and the conversation after them.
        """
        batch, samples = noise(0).shape[:2]
        like = self.minimum.new_zeros(batch, self.chunk, self.minimum.shape[1] - self._told)
        heard = (like if now.heard is None else now.heard).repeat_interleave(samples, dim=0)[:, None]
        clean, past = self._draw(heard, lambda number: noise(number).flatten(0, 1)[:, None], now.past)
        raw = self.denormalise(clean.reshape(batch, samples, self.chunk, -1), now.chunk * self.chunk)
        return raw, Conversation(now.chunk + 1, None, past)

    def hear(self, now: Conversation, speaker: Tensor) -> Conversation:
        """The conversation after the speaker's raw encoding (batch, chunk, encoding) of the chunk that was just reacted in."""
        heard = self.normalise(speaker[..., self._told :], self._told, (now.chunk - 1) * self.chunk)
        return Conversation(now.chunk, self._without_hidden(heard), now.past)

    def _draw(
        self, heard: Tensor, noise: Noise, past: tuple[Past, ...], real: Tensor | None = None
    ) -> tuple[Tensor, tuple[Past, ...]]:
        """Clean chunks (batch, chunks, frames, target) under heard ones (batch, chunks, frames, features), and the past after them.

        The past is of what was drawn, or of what is `real`, of the same shape.
        """
        guided, networks = self.guidance != 1, (self, *self.weaker)
        asked = torch.cat((heard, torch.zeros_like(heard))) if guided else heard
        known = [(one, one._condition(asked), then) for one, then in zip(networks, past or (Past(),) * len(networks), strict=True)]

        def twice(x: Tensor) -> Tensor:
            return torch.cat((x, x)) if guided else x

        def predict(noisy: Tensor, time: float) -> Tensor:
            times = torch.full(noisy.shape[:2], time, device=noisy.device)
            answer, *weaker = (one._denoise(twice(noisy), twice(times), condition, then) for one, condition, then in known)
            for weak in weaker:
                answer = weak + self.autoguidance * (answer - weak)
            if not guided:
                return answer
            hearing, deaf = answer.chunk(2)
            return deaf + self.guidance * (hearing - deaf)

        clean = self.sampler(self.process, predict, noise, self.sampling_steps, self.limits(self.target))
        if isinstance(self.denoiser, FrameTransformer) and self.smoothing:
            shown = past[0].shown if past else None
            before = None if shown is None else shown[: len(clean)].float()  # guided, it is there twice
            every = self.denoiser.patch if self.denoiser.patch > 1 else self.chunk
            frames = smooth(clean.flatten(1, 2), before, every, self.smoothing)
            clean = frames.clamp(*self.limits(self.target)).view_as(clean)
        if self.joint and self.online:
            finished = clean if real is None else real
            past = tuple(one._remember(twice(finished), condition, then) for one, condition, then in known)
        return clean, past

    def _remember(self, clean: Tensor, condition: Tensor, past: Past) -> Past:
        """The past after chunks that are finished."""
        assert isinstance(self.denoiser, FrameTransformer)
        return self.denoiser.remember(clean.to(self._dtype), condition, past)

    def _finished(self, listener: Tensor) -> Tensor:
        """Raw encodings of listeners (items, frames, encoding) to normalised chunks (items, chunks, frames, target)."""
        return self._chunks(self.normalise(listener[..., : self.target]))

    def _heard(self, speaker: Tensor) -> Tensor:
        """What each chunk may know of the speaker: raw encodings (items, frames, encoding) to (items, chunks, frames, features)."""
        told = speaker[..., self._told :] if speaker.shape[-1] == self.minimum.shape[1] else speaker
        chunks = self._chunks(self.normalise(told, self._told))
        return torch.cat((torch.zeros_like(chunks[:, :1]), chunks[:, :-1]), dim=1) if self.online else chunks

    def _shown(self, streams: Tensor) -> Tensor:
        """From 1 or 0 for each stream, (..., streams), to the same for each of their features."""
        widths = [width for part, width in self.parts.items() if part not in TARGETS]
        return torch.cat([one.expand(*one.shape[:-1], width) for one, width in zip(streams.split(1, dim=-1), widths, strict=True)], dim=-1)

    def _without_hidden(self, heard: Tensor) -> Tensor:
        """What is heard (..., features) without the streams that a generation does without; training decides for itself."""
        if not self.hidden:
            return heard
        names = [part for part in self.parts if part not in TARGETS]
        shown = self._shown(torch.tensor([name not in self.hidden for name in names], device=heard.device))
        return torch.where(shown, heard, 0.0)  # whatever a dead sensor gives

    def _history(self, clean: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The finished chunks that those after them see in training, of the shape of `clean`; none is of a later moment than its own."""
        history = clean
        if "shift" in batch:
            here = torch.arange(clean.shape[1], device=clean.device)
            place = (here - batch["shift"][:, None]) % (here + 1)  # or a chunk would find itself among those before it
            history = history.gather(1, place[:, :, None, None].expand_as(history))
        return history + self._chunks(batch["history_noise"].flatten(1, 2)) if "history_noise" in batch else history

    def _condition(self, heard: Tensor) -> Tensor:
        """Normalised chunks (items, chunks, frames, features) to the condition of every chunk, (items, chunks, ...)."""
        heard = heard.to(self._dtype)
        if isinstance(self.denoiser, FrameTransformer):
            return self.condition(self.denoiser.fold(heard))
        return self.condition(heard.flatten(0, 1)).unflatten(0, heard.shape[:2])

    def _denoise(
        self, noisy: Tensor, times: Tensor, condition: Tensor, past: Past | None = None, history: Tensor | None = None
    ) -> Tensor:
        """The denoiser in the weights' precision; its answer in float32, where the process is computed."""
        noisy = noisy.to(self._dtype)
        if self.joint:
            return self.denoiser(noisy, times, condition, past, None if history is None else history.to(self._dtype)).float()
        return self.denoiser(*(each.flatten(0, 1) for each in (noisy, times, condition))).unflatten(0, noisy.shape[:2]).float()

    def _whole(self, batch: dict[str, Tensor], person: str) -> Tensor:
        """A person's raw encoding of a batch, or all of it that is used: a listener's targets, or a speaker's streams."""
        if person in batch:
            return batch[person]
        return torch.cat([batch[name].float() for part in self.parts if (name := f"{person} {part}") in batch], dim=-1)

    def _chunks(self, frames: Tensor) -> Tensor:
        """(items, frames, features) -> (items, chunks, frames of a chunk, features)."""
        windows_of(frames.shape[1])
        return frames.unflatten(1, (frames.shape[1] // self.chunk, self.chunk))

    @property
    def _told(self) -> int:
        """The first feature of a speaker's encoding that is heard."""
        return self.target if self.direct else 0

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _projector(model: config.Model) -> nn.Sequential:
    """A speaker window (batch, 50, latent), flattened frame by frame, to its condition (batch, condition)."""
    if model.condition <= GROUPS:
        raise ValueError(
            f"model.condition is {model.condition}: in {GROUPS} groups of one feature each, normalisation leaves nothing of the speaker; "
            f"make it at least {2 * GROUPS}"
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(WINDOW * model.latent, model.condition), nn.GroupNorm(GROUPS, model.condition), nn.SiLU())

