"""The two stages of training: what one item of each reads, which random numbers belong to it, and the module to train.

The machinery trains any stage through these three questions and knows nothing else of faces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from reactdiff.clip import PERSONS, TARGETS, speaker_listener, windows_of
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import StreamSpec
from reactdiff.diffusion.noise import training_noise
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.init import initialise
from reactdiff.model.latent_diffusion import LatentDiffusion

LATENT = "latent"
"""The one stream of every person in a dataset of latents."""


@dataclass(frozen=True)
class Source:
    """What a stage needs to know of its dataset: input streams, and frames of every clip."""

    streams: Sequence[StreamSpec]
    frames: int


class Stage(Protocol):
    """A stage of training; an item is (clip, side), and its index is 2 * clip + side."""

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """What an item of this side reads: name in the batch -> (person, stream)."""

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """The random arrays of the item at a position of the order."""

    def module(self) -> nn.Module:
        """The module to train, its weights as they come; its forward gives one loss per item."""


@dataclass(frozen=True)
class AutoencoderStage:
    """Stage 1: from a person's own streams that person's attributes and coefficients; side is the person."""

    model: Model
    source: Source

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """Only the streams the model is configured for, and both targets."""
        return {name: (PERSONS[side], name) for name in (*self.model.facial, *self.model.acoustic, *TARGETS)}

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Nothing here is random."""
        return {}

    def module(self) -> Autoencoder:
        """The Multi-Modality Transformer and its decoder."""
        return Autoencoder(self.model, self.source.streams)


@dataclass(frozen=True)
class DiffusionStage:
    """Stage 2: the listener's latents given the speaker's; side is the direction."""

    model: Model
    diffusion: Diffusion
    source: Source

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """Both persons' latents."""
        speaker, listener = speaker_listener(side)
        return {"speaker": (speaker, LATENT), "listener": (listener, LATENT)}

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Diffusion times and noise of each window."""
        noise, times = training_noise(seed, position, windows_of(self.source.frames), self.model.latent, self.diffusion.steps)
        return {"noise": noise, "times": times}

    def module(self) -> LatentDiffusion:
        """The denoiser and the condition projector, whose latent range is not yet set."""
        return LatentDiffusion(self.model, self.diffusion, self.source.frames)


def stage(name: str, model: Model, diffusion: Diffusion, source: Source) -> AutoencoderStage | DiffusionStage:
    """The stage of a name in `reactdiff.config.STAGES`."""
    return AutoencoderStage(model, source) if name == "autoencoder" else DiffusionStage(model, diffusion, source)


def build(stage: Stage, seed: int) -> nn.Module:
    """A stage's module with weights keyed by (seed, parameter name)."""
    module = stage.module()
    initialise(module, seed)
    return module


def shapes(stage: Stage, model: Model, source: Source) -> dict[str, tuple[int, ...]]:
    """The tensors of one item as its batch names them, without the leading axis of items."""
    widths = {spec.name: spec.width for spec in source.streams} | TARGETS | {LATENT: model.latent}
    read: dict[str, tuple[int, ...]] = {name: (source.frames, widths[stream]) for name, (_, stream) in stage.reads(0).items()}
    return read | {name: array.shape for name, array in stage.draw(0, 0).items()}


def empty_batch(stage: Stage, model: Model, source: Source, items: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of zeros of the right shapes and types, for counting and measuring."""
    batch = {name: torch.zeros(items, *shape, device=device) for name, shape in shapes(stage, model, source).items()}
    return {name: tensor.long() if name == "times" else tensor for name, tensor in batch.items()}
