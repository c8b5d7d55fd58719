"""The authors' published files: the names of their weights, how ours are made of them, and both models out of the files.

Ours pack projections of one stream into one matrix, so one of our parameters is made of one, two or three of theirs,
stacked along the first axis. Stage 2 in their file is the UNet alone; the condition's projector may come in a file of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.data.sample import StreamSpec
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.init import initialise
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.mmt import Fusion
from reactdiff.model.pth import Pth, read_pth
from reactdiff.model.unet import UNet

Sources = dict[str, tuple[str, ...]]
"""Our parameter name -> the authors' names, in the order in which they are stacked."""

UNUSED = re.compile(r"Behaviour_features_fusion\..*\.norm2\.(weight|bias)|reaction_decoder\.encoder\..*")
"""Weights in the authors' stage 1 file that their model never uses."""

FUSION = "Behaviour_features_fusion"
DECODER = "reaction_decoder"
HEADS = {"attributes": "listener_reaction_emotion_map_layer", "coefficients": "listener_reaction_3dmm_map_layer"}
BLOCK = {
    "residual": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    "attention": {"norm": "norm", "qkv": "qkv", "out": "proj_out"},
    "resize": {"": "conv"},
    "conv": {"": "op"},
}
"""Child of a UNet block -> our layer -> the authors' layer."""

MODEL = {
    "family": "reactdiff",
    "denoiser": "unet",
    "heads": 4,
    "intra": True,
    "intra_depth": 2,
    "inter": True,
    "inter_depth": 2,
    "bounded": False,
    "multipliers": (1, 2, 4, 8),
    "blocks": 2,
}
"""What the authors' weights can be of `model.*`, beside widths, streams and `online`."""

DIFFUSION = {"steps": 20, "schedule": "cosine", "prediction": "epsilon", "guidance": 1, "normalisation": "frame"}
"""What their denoiser was trained with."""

FILES = "STAGE1.pth STAGE2.pth [PROJECTOR.pth]"
PROJECTOR = ("1.weight", "1.bias", "2.weight", "2.bias")

UNTRAINED = (
    "THE CONDITION IS UNTRAINED: the authors' stage 2 file holds the denoiser without the projector of the speaker, which therefore "
    "has random weights keyed by the seed, and reactions do not follow the speaker. If you have the projector's weights "
    f"({', '.join(f'linear.{name}' for name in PROJECTOR)}), give their file as the third: {FILES}"
)
"""What is said wherever no projector is given."""


@dataclass(frozen=True)
class Imported:
    """Both models out of the authors' files, in evaluation mode on the CPU.

    Attributes:
        autoencoder: stage 1.
        diffusion: stage 2, its latent range that of stage 1's `statistics`.
        ignored: names in the stage 1 file that their model never uses.
        projector: whether its file was given; without it the condition is untrained (`UNTRAINED`).
    """

    autoencoder: Autoencoder
    diffusion: LatentDiffusion
    ignored: list[str]
    projector: bool


def load_published(
    model: config.Model,
    diffusion: config.Diffusion,
    streams: Sequence[StreamSpec],
    stage1: Path,
    stage2: Path,
    projector: Path | None = None,
    seed: int = 0,
) -> Imported:
    """Both models from the authors' files; widths are those of the files, and frames those of the statistics.

    Args:
        model: streams and depths; of its widths those of the files take the place.
        diffusion: the authors' process; how it is sampled is free.
        streams: of the dataset the models will read.
        stage1: `{"state_dict", "statistics", ...}`; the statistics' min and max are (frames, latent).
        stage2: `{"state_dict", ...}` of the UNet.
        projector: the condition's `linear.1.*` and `linear.2.*`, if they are known.
        seed: keys the projector's weights if they are not.

    Raises:
        ValueError: if a file cannot be read or is not what it should be, or model or diffusion are not the authors'.
    """
    assert_authors(model)
    _assert_equal("diffusion", diffusion, DIFFUSION)
    first, second = read_pth(stage1), read_pth(stage2)
    model = model.model_copy(update=_widths(first, second))
    minimum, maximum = _range(first, model.latent)
    autoencoder = Autoencoder(model, streams)
    latent_diffusion = LatentDiffusion(model, diffusion, len(minimum))
    initialise(latent_diffusion, seed)
    ignored = fill_autoencoder(autoencoder, first)
    fill_diffusion(latent_diffusion, second, read_pth(projector) if projector else None)
    latent_diffusion.set_range(minimum, maximum)
    return Imported(autoencoder.eval(), latent_diffusion.eval(), ignored, projector is not None)


def assert_authors(model: config.Model) -> None:
    """Check that a model of this configuration can take the authors' weights, whatever its widths.

    Raises:
        ValueError: if it cannot, naming the field and the value it needs.
    """
    _assert_equal("model", model, MODEL)


def fill_autoencoder(autoencoder: Autoencoder, stage1: Pth) -> list[str]:
    """Fills an autoencoder from the authors' stage 1; returns the names that were ignored.

    Raises:
        ValueError: if the two do not fit, naming the file.
    """
    return _fill(autoencoder, autoencoder_sources(autoencoder), stage1)


def fill_diffusion(diffusion: LatentDiffusion, stage2: Pth, projector: Pth | None) -> None:
    """Fills the denoiser, and the projector if it is known; the latents' range stays as it is.

    Raises:
        ValueError: if they do not fit, naming the file.
    """
    assert isinstance(diffusion.denoiser, UNet)
    _fill(diffusion.denoiser, denoiser_sources(diffusion.denoiser), stage2)
    if projector:
        _fill(projector_of(diffusion), projector_sources(projector.weights), projector)


def projector_of(diffusion: LatentDiffusion) -> nn.Module:
    """The module with the four parameters of the condition's projector."""
    return diffusion.condition


def autoencoder_sources(autoencoder: Autoencoder) -> Sources:
    """Where each of the autoencoder's parameters is in the authors' stage 1 file.

    Raises:
        ValueError: if the autoencoder fuses no face or no voice, or reads more than two acoustic streams, which the authors' does not.
    """
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    facial, acoustic = encoder.facial, encoder.acoustic
    if not isinstance(facial, Fusion) or not isinstance(acoustic, Fusion):
        raise ValueError("the authors' weights fuse face and voice by attention: name streams of both, and set model.intra=true")
    if len(acoustic.rest):
        raise ValueError(f"model.acoustic names {2 + len(acoustic.rest)} streams, but the authors' weights know two; name two")
    others = len(set(facial.rest_names))
    units = {"facial.first": "video_features_fusion.fusion_0", "acoustic.first": "audio_feature_fusion"}
    for i in range(len(facial.rest)):
        units[f"facial.rest.{i}"] = f"video_features_fusion.fusion_cyc.{i // others}.attn{i % others + 1}"
    for i in range(len(encoder.inter)):
        units[f"inter.{i}"] = f"video_audio_fusion.{i}"
    sources: Sources = {}
    for ours, theirs in units.items():
        sources |= _unit_sources(encoder.get_submodule(ours), f"encoder.{ours}", f"{FUSION}.{theirs}")
    sources |= _same(encoder.map, "encoder.map", f"{FUSION}.video_audio_fusion_map_layer")
    sources |= _same(encoder.mlp, "encoder.mlp", "reaction_encoder.MLP")
    for i, stack in enumerate(decoder.stacks):
        sources |= _same(stack, f"decoder.stacks.{i}", f"{DECODER}.listener_reaction_decoder_{i + 1}")
    for name, theirs in HEADS.items():
        sources |= _same(decoder.heads[name], f"decoder.heads.{name}", f"{DECODER}.{theirs}")
    return sources


def denoiser_sources(unet: UNet) -> Sources:
    """Where each of the UNet's parameters is in the authors' stage 2 file."""
    sources = _same(unet.time, "time", "time_embed") | _same(unet.stem, "stem", "input_blocks.0.0")
    for i, block in enumerate(unet.down):
        sources |= _block_sources(block, f"down.{i}", f"input_blocks.{i + 1}", 0)
    for i, block in enumerate(unet.middle):
        sources |= _block_sources(block, f"middle.{i}", "middle_block", 2 * i)
    for i, block in enumerate(unet.up):
        sources |= _block_sources(block, f"up.{i}", f"output_blocks.{i}", 0)
    return sources | _same(unet.norm, "norm", "out.0") | _same(unet.out, "out", "out.2")


def projector_sources(state: Mapping[str, Tensor]) -> Sources:
    """Where the parameters of the condition's projector are in a file that names them `1.` and `2.`, or `linear.1.` and `linear.2.`."""
    prefix = "linear." if any(name.startswith("linear.") for name in state) else ""
    return {name: (f"{prefix}{name}",) for name in PROJECTOR}


def load_authors(module: nn.Module, sources: Sources, state: Mapping[str, Tensor]) -> list[str]:
    """Fills a module from the authors' state dict.

    Returns:
        The names in the state dict that the authors' model itself never uses, and that were ignored.

    Raises:
        ValueError: if a weight is missing, left over, or of another shape.
    """
    used = {name for names in sources.values() for name in names}
    unused = sorted(name for name in state if UNUSED.fullmatch(name))
    missing, unknown = sorted(used - set(state)), sorted(set(state) - used - set(unused))
    if missing or unknown:
        raise ValueError(
            f"the authors' weights do not fit this {type(module).__name__}: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}; give the file of this stage, and the streams, widths and depths it was trained with"
        )
    for name, parameter in module.named_parameters():
        try:
            value = torch.cat([state[source] for source in sources[name]])
        except RuntimeError:
            shapes = " + ".join(f"{source} {tuple(state[source].shape)}" for source in sources[name])
            raise ValueError(f"the authors' {shapes} cannot be stacked to {name} {tuple(parameter.shape)}") from None
        # Some of their 1x1 convolutions are linear layers here: the same numbers without the last axis.
        if tuple(value.shape) not in (tuple(parameter.shape), (*parameter.shape, 1)):
            raise ValueError(
                f"the authors' {' + '.join(sources[name])} has shape {tuple(value.shape)}, but {name} is {tuple(parameter.shape)}; "
                "give model.* and the dataset's streams the widths of the file"
            )
        with torch.no_grad():
            parameter.copy_(value.view_as(parameter))
    return unused


def _fill(module: nn.Module, sources: Sources, file: Pth) -> list[str]:
    try:
        return load_authors(module, sources, file.weights)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _assert_equal(branch: str, settings: config.Branch, theirs: Mapping[str, object]) -> None:
    for name, value in theirs.items():
        if (ours := getattr(settings, name)) != value:
            raise ValueError(f"{branch}.{name} is {ours!r}, but the authors' weights are of {value!r}: set {branch}.{name} to it")


def _widths(stage1: Pth, stage2: Pth) -> dict[str, int]:
    """The widths of `model.*` that the weights show."""
    time = _size(stage2, "time_embed.2.weight", 0)
    return {
        "hidden": _size(stage1, f"{FUSION}.video_audio_fusion.0.attention.out_proj.weight", 0),
        "latent": _size(stage1, "reaction_encoder.MLP.0.weight", 1),
        "channels": _size(stage2, "input_blocks.0.0.weight", 0),
        "condition": _size(stage2, "input_blocks.1.0.emb_layers.1.weight", 1) - time,
    }


def _size(file: Pth, name: str, axis: int) -> int:
    if name not in file.weights or file.weights[name].dim() <= axis:
        raise ValueError(f"{file.path} has no matrix {name}, so it is not the authors' file of this stage: give {FILES} in this order")
    return file.weights[name].shape[axis]


def _range(stage1: Pth, latent: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the latents the files were trained on, (frames, latent) each."""
    statistics = stage1.content.get("statistics")
    found = [statistics.get(name) for name in ("min", "max")] if isinstance(statistics, Mapping) else [None]
    bounds = [bound.float() for bound in found if isinstance(bound, Tensor) and bound.dim() == 2 and bound.shape[1] == latent]
    if len(bounds) != 2:
        shapes = [tuple(bound.shape) if isinstance(bound, Tensor) else bound for bound in found]
        raise ValueError(
            f"{stage1.path} should hold `statistics` with min and max of the latents, tensors (frames, {latent}) each, but they are "
            f"{' and '.join(map(str, shapes))}: without them no latent can be normalised; give the authors' whole stage 1 file"
        )
    return bounds[0], bounds[1]


def _unit_sources(unit: nn.Module, ours: str, theirs: str) -> Sources:
    """An attention unit; `kv.weight` of ours is `k.weight` over `v.weight` of theirs."""
    sources: Sources = {}
    for leaf, _ in unit.named_parameters():
        child, rest = leaf.split(".", 1)
        names = [f"{letter}.{rest}" for letter in child] if child in ("q", "kv", "qkv") else [leaf.replace("norm.", "norm1.")]
        sources[f"{ours}.{leaf}"] = tuple(f"{theirs}.{name}" for name in names)
    return sources


def _block_sources(block: nn.Module, ours: str, theirs: str, first: int) -> Sources:
    """A block of the UNet; what it is made of is numbered from `first` in theirs."""
    sources: Sources = {}
    for number, (child, module) in enumerate(block.named_children(), start=first):
        for leaf, _ in module.named_parameters():
            layer, _, kind = leaf.rpartition(".")
            sources[f"{ours}.{child}.{leaf}"] = (f"{theirs}.{number}.{BLOCK[child][layer]}.{kind}",)
    return sources


def _same(module: nn.Module, ours: str, theirs: str) -> Sources:
    """Parameters that are called the same below two prefixes."""
    return {f"{ours}.{leaf}": (f"{theirs}.{leaf}",) for leaf, _ in module.named_parameters()}
