"""The names of the authors' published weights, and how ours are made of them.

Ours pack projections of one stream into one matrix, so one of our parameters is made of one, two or three of theirs,
stacked along the first axis. Stage 2 in their file is the UNet alone; the condition's projector may come in a file of its own.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reactdiff.model.autoencoder import Autoencoder
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


def autoencoder_sources(autoencoder: Autoencoder) -> Sources:
    """Where each of the autoencoder's parameters is in the authors' stage 1 file.

    Raises:
        ValueError: if the autoencoder reads more than two acoustic streams, which the authors' does not.
    """
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    if len(encoder.acoustic.rest):
        raise ValueError(f"model.acoustic names {2 + len(encoder.acoustic.rest)} streams, but the authors' weights know two; name two")
    others = len(set(encoder.facial.rest_names))
    units = {"facial.first": "video_features_fusion.fusion_0", "acoustic.first": "audio_feature_fusion"}
    for i in range(len(encoder.facial.rest)):
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
    return {name: (f"{prefix}{name}",) for name in ("1.weight", "1.bias", "2.weight", "2.bias")}


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
        value = torch.cat([state[source] for source in sources[name]])
        # Some of their 1x1 convolutions are linear layers here: the same numbers without the last axis.
        if tuple(value.shape) not in (tuple(parameter.shape), (*parameter.shape, 1)):
            raise ValueError(
                f"the authors' {' + '.join(sources[name])} has shape {tuple(value.shape)}, but {name} is {tuple(parameter.shape)}; "
                "give model.* and the dataset's streams the widths of the file"
            )
        with torch.no_grad():
            parameter.copy_(value.view_as(parameter))
    return unused


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
