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

from reactdiff.clip import PERSONS, TARGETS, WINDOW, speaker_listener, windows_of
from reactdiff.config import STAGES, Diffusion, Model
from reactdiff.data.keyed import normal
from reactdiff.data.sample import StreamSpec
from reactdiff.diffusion.noise import training_chance, training_hearing, training_levels, training_noise, training_times
from reactdiff.diffusion.process import Process
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.belfusion import BehaviourVAE
from reactdiff.model.codec import LATENT, Codec
from reactdiff.model.flops import training_flops
from reactdiff.model.init import initialise, parameters_without_memory
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.perfrdiff import AttributeAutoencoder
from reactdiff.model.raw_streams import RawStreams
from reactdiff.model.trans_vae import TransVAE

CODECS: dict[str, Callable[[Model, Sequence[StreamSpec]], Codec]] = {
    "reactdiff": Autoencoder,
    "perfrdiff": AttributeAutoencoder,
    "trans-vae": TransVAE,
    "belfusion": BehaviourVAE,
}
"""What stage 1 trains, by `model.family`."""


def stages_of(model: Model) -> tuple[str, ...]:
    """The stages that a model is trained in: Trans-VAE has only the first, one that denoises attributes themselves only the second."""
    if model.space == "attributes":
        return STAGES[1:]
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

    def targets(self) -> set[str]:
        """What of an item may be another's, as its batch names it: the reaction that is to be learnt, where it is given the speaker."""

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

    def targets(self) -> set[str]:
        """Nothing: what is encoded is what is decoded."""
        return set()

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """A variational autoencoder draws a latent: Trans-VAE of the clip, BeLFusion of each window. Nothing else is random."""
        latents = {"trans-vae": (self.model.latent,), "belfusion": (windows_of(self.source.frames), WINDOW * self.model.latent)}
        shape = latents.get(self.model.family)
        return {"noise": normal(shape, seed, "posterior", position)} if shape else {}

    def module(self) -> Codec:
        """The family's codec; without a first stage, what stands for it."""
        return (RawStreams if self.model.space == "attributes" else CODECS[self.model.family])(self.model, self.source.streams)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """What the codec reads of a person."""
        with torch.device("meta"):
            return self.module().inputs

    def encoded(self) -> Source:
        """What stage 2 will find: the encodings of these streams."""
        with torch.device("meta"):
            parts = self.module().parts
        return Source([StreamSpec(name, "latent", width) for name, width in parts.items()], self.source.frames)


@dataclass(frozen=True)
class DiffusionStage:
    """Stage 2: the listener's latents given the speaker's; side is the direction. Its source is a dataset of encodings."""

    model: Model
    diffusion: Diffusion
    source: Source

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """Both persons' latents; or what the listener shows, and the speaker's streams."""
        speaker, listener = speaker_listener(side)
        if self.model.space == "latent":
            return {"speaker": (speaker, LATENT), "listener": (listener, LATENT)}
        heard = {f"speaker {spec.name}": (speaker, spec.name) for spec in self.source.streams if spec.name not in TARGETS}
        return heard | {f"listener {name}": (listener, name) for name in TARGETS}

    def targets(self) -> set[str]:
        """What the listener shows."""
        return {name for name, (person, _) in self.reads(0).items() if person == speaker_listener(0)[1]}

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Noise, the diffusion time of each chunk, and what else is a matter of chance: what is heard, and what is remembered."""
        windows, chunks, asked = windows_of(self.source.frames), self.source.frames // self.model.chunk_frames, self.diffusion
        drawn = {"noise": training_noise(seed, position, windows, self.target), "times": self._times(seed, position, chunks)}
        if asked.condition_dropout:
            drawn["hears"] = training_hearing(seed, position, chunks, asked.condition_dropout)
        if asked.stream_dropout:
            count = len(self.source.streams) - len(TARGETS)
            drawn["streams"] = (training_chance(seed, position, "training streams", count) >= asked.stream_dropout).astype(np.float32)
        if asked.history_swap:
            swapped, where = training_chance(seed, position, "training history", 2)
            drawn["shift"] = np.array(1 + int(where * (chunks - 1)) if swapped < asked.history_swap else 0)
        if asked.history_noise:
            deviation = np.float32(asked.history_noise * training_chance(seed, position, "training history noise")[0])
            drawn["history_noise"] = deviation * training_noise(seed, position, windows, self.target, "noise on history")
        return drawn

    def _times(self, seed: int, position: int, chunks: int) -> np.ndarray:
        """The diffusion time of each chunk, (chunks,): whole numbers where they are uniform."""
        if self.diffusion.times == "uniform":
            return training_times(seed, position, chunks, self.diffusion.steps)
        levels = training_levels(seed, position, chunks, self.diffusion.level, self.diffusion.level_deviation)
        return self._process.times(levels).astype(np.float32)

    def module(self) -> LatentDiffusion:
        """The denoiser and its condition, whose latent range is not yet set."""
        parts = {spec.name: spec.width for spec in self.source.streams}
        return LatentDiffusion(self.model, self.diffusion, self.source.frames, parts)

    @cached_property
    def _process(self) -> Process:
        return Process(self.diffusion)

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
    second = DiffusionStage(model, diffusion, first.encoded())
    both: dict[str, AutoencoderStage | DiffusionStage] = dict(zip(STAGES, (first, second), strict=True))
    kinds = {name: both[name] for name in stages_of(model)}
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
    whole = {name for name, drawn in stage.draw(0, 0).items() if drawn.dtype == np.int64}
    batch = {name: torch.zeros(items, *shape, device=device) for name, shape in shapes(stage).items()}
    return {name: tensor.long() if name in whole else tensor for name, tensor in batch.items()}


def stored_batch(stage: Stage, items: int, device: str) -> dict[str, torch.Tensor]:
    """An `empty_batch` in the types that datasets have: streams in half precision, targets and what is drawn in single."""
    streams = {name for name, (_, stream) in stage.reads(0).items() if stream not in TARGETS}
    return {name: tensor.half() if name in streams else tensor for name, tensor in empty_batch(stage, items, device).items()}


def flops_per_item(stage: Stage) -> int:
    """Floating point operations of training on one item, as `training_flops` counts them."""
    with torch.device("meta"):
        return training_flops(stage.module(), empty_batch(stage, 1, "meta"))
