"""The stages of training: what one item of each reads, which random numbers belong to it, and the module to train.

The machinery trains any stage through these three questions and knows nothing else of faces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import nn

from reactdiff.clip import PERSONS, TARGETS, speaker_listener, windows_of
from reactdiff.config import STAGES, Diffusion, Model
from reactdiff.data.keyed import normal
from reactdiff.data.sample import StreamSpec
from reactdiff.diffusion.noise import training_hearing, training_noise
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.codec import Codec
from reactdiff.model.flops import training_flops
from reactdiff.model.init import initialise, parameters_without_memory
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.perfrdiff import AttributeAutoencoder
from reactdiff.model.trans_vae import TransVAE

LATENT = "latent"
"""The one stream of every person in a dataset of latents: their encoding by stage 1."""

CODECS: dict[str, Callable[[Model, Sequence[StreamSpec]], Codec]] = {
    "reactdiff": Autoencoder,
    "perfrdiff": AttributeAutoencoder,
    "trans-vae": TransVAE,
}
"""What stage 1 trains, by `model.family`."""


def stages_of(model: Model) -> tuple[str, ...]:
    """The stages that a family is trained in; Trans-VAE has only the first."""
    return STAGES[:1] if model.family == "trans-vae" else STAGES


@dataclass(frozen=True)
class Source:
    """What a stage needs to know of its dataset: input streams, and frames of every clip."""

    streams: Sequence[StreamSpec]
    frames: int

    def width(self, stream: str) -> int:
        """Features of a frame of a stream or target."""
        return ({spec.name: spec.width for spec in self.streams} | TARGETS)[stream]


class Stage(Protocol):
    """A stage of training; an item is (clip, side), and its index is 2 * clip + side."""

    @property
    def source(self) -> Source:
        """The dataset it is trained on."""

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """What an item of this side reads: name in the batch -> (person, stream)."""

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """The random arrays of the item at a position of the order."""

    def module(self) -> nn.Module:
        """The module to train, its weights as they come; its forward gives one loss per item."""


@dataclass(frozen=True)
class AutoencoderStage:
    """Stage 1: from a person's own streams that person's targets; side is the person.

    Trans-VAE, which has no other stage: from the speaker's streams the listener's targets; side is the direction.
    """

    model: Model
    source: Source

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """Only the streams the model reads, and both targets."""
        person = PERSONS[side]
        of_targets = speaker_listener(side)[1] if self.model.family == "trans-vae" else person
        return {name: (person, name) for name in self.inputs} | {name: (of_targets, name) for name in TARGETS}

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Trans-VAE draws its latent; otherwise nothing here is random."""
        return {"noise": normal((self.model.latent,), seed, "posterior", position)} if self.model.family == "trans-vae" else {}

    def module(self) -> Codec:
        """The family's codec."""
        return CODECS[self.model.family](self.model, self.source.streams)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What the codec reads of a person."""
        with torch.device("meta"):
            return self.module().inputs

    def encoded(self) -> Source:
        """What stage 2 will find: the encodings of these streams."""
        with torch.device("meta"):
            return Source([StreamSpec(LATENT, "latent", self.module().width)], self.source.frames)


@dataclass(frozen=True)
class DiffusionStage:
    """Stage 2: the listener's latents given the speaker's; side is the direction. Its source is a dataset of encodings."""

    model: Model
    diffusion: Diffusion
    source: Source

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """Both persons' latents."""
        speaker, listener = speaker_listener(side)
        return {"speaker": (speaker, LATENT), "listener": (listener, LATENT)}

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Diffusion times and noise of each window, and whether the speaker is heard where that is a matter of chance."""
        windows, dropout = windows_of(self.source.frames), self.diffusion.condition_dropout
        noise, times = training_noise(seed, position, windows, self.target, self.diffusion.steps)
        drawn = {"noise": noise, "times": times}
        return drawn | {"hears": training_hearing(seed, position, windows, dropout)} if dropout else drawn

    def module(self) -> LatentDiffusion:
        """The denoiser and its condition, whose latent range is not yet set."""
        return LatentDiffusion(self.model, self.diffusion, self.source.frames, self.source.width(LATENT))

    @cached_property
    def target(self) -> int:
        """Features of a frame that are denoised."""
        with torch.device("meta"):
            return self.module().target


def stage(name: str, model: Model, diffusion: Diffusion, source: Source) -> AutoencoderStage | DiffusionStage:
    """The stage of a name in `reactdiff.config.STAGES`."""
    return AutoencoderStage(model, source) if name == "autoencoder" else DiffusionStage(model, diffusion, source)


def stages_over(clips: Source, model: Model, diffusion: Diffusion) -> dict[str, AutoencoderStage | DiffusionStage]:
    """The stages of a family by name, the first over a dataset of clips, the second over what the first makes of it.

    Raises:
        ValueError: if the dataset lacks a stream that the model reads, or a width does not suit a network.
    """
    first = AutoencoderStage(model, clips)
    kinds: dict[str, AutoencoderStage | DiffusionStage] = {"autoencoder": first}
    if "diffusion" in stages_of(model):
        kinds["diffusion"] = DiffusionStage(model, diffusion, first.encoded())
    with torch.device("meta"):
        for kind in kinds.values():
            kind.module()
    return kinds


def build(stage: Stage, seed: int) -> nn.Module:
    """A stage's module with weights keyed by (seed, parameter name)."""
    module = stage.module()
    initialise(module, seed)
    return module


def build_without_memory(stage: Stage) -> nn.Module:
    """A stage's module with parameters on the device "meta", for who divides them before they have values."""
    with parameters_without_memory():
        return stage.module()


def shapes(stage: Stage) -> dict[str, tuple[int, ...]]:
    """The tensors of one item as its batch names them, without the leading axis of items."""
    frames = stage.source.frames
    read: dict[str, tuple[int, ...]] = {name: (frames, stage.source.width(stream)) for name, (_, stream) in stage.reads(0).items()}
    return read | {name: array.shape for name, array in stage.draw(0, 0).items()}


def empty_batch(stage: Stage, items: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of zeros of the right shapes and types, for counting and measuring."""
    batch = {name: torch.zeros(items, *shape, device=device) for name, shape in shapes(stage).items()}
    return {name: tensor.long() if name == "times" else tensor for name, tensor in batch.items()}


def stored_batch(stage: Stage, items: int, device: str) -> dict[str, torch.Tensor]:
    """An `empty_batch` in the types that datasets have: streams in half precision, targets and what is drawn in single."""
    streams = {name for name, (_, stream) in stage.reads(0).items() if stream not in TARGETS}
    return {name: tensor.half() if name in streams else tensor for name, tensor in empty_batch(stage, items, device).items()}


def flops_per_item(stage: Stage) -> int:
    """Floating point operations of training on one item, as `training_flops` counts them."""
    with torch.device("meta"):
        return training_flops(stage.module(), empty_batch(stage, 1, "meta"))
