"""The encoder: the Multi-Modality Transformer, from a person's feature streams to latent frames."""

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.model.attention import AttentionUnit
from reactdiff.model.layers import check_heads, mlp


class MultiModalityTransformer(nn.Module):
    """Fuses the streams of each class, then face with voice, and maps every frame to a latent (Li et al., 2025, MMT).

    Facial: the first stream attends to itself, then for `intra_depth` rounds to each other one. Acoustic: the first attends
    to the second, or to itself where it is alone, then to any more. Then the face attends to the voice `inter_depth` times.
    Ablations (the paper's): without `intra`, the streams of a class are projected and added; without `inter`, face and voice
    are added; a class without streams leaves the other one alone.

    Args:
        model: names of the streams, widths and depths.
        widths: width of every stream that `model` names.

    Raises:
        ValueError: if `model.hidden` does not divide into heads.
    """

    def __init__(self, model: config.Model, widths: dict[str, int]):
        super().__init__()
        check_heads("model.hidden", model.hidden, model.heads)
        self.facial: nn.Module | None
        self.acoustic: nn.Module | None
        if model.intra:
            self.facial = Fusion(model, model.facial[:1], model.facial[1:] * model.intra_depth, widths) if model.facial else None
            self.acoustic = Fusion(model, model.acoustic[:2], model.acoustic[2:], widths) if model.acoustic else None
        else:
            self.facial, self.acoustic = (_Sum(model, names, widths) if names else None for names in (model.facial, model.acoustic))
        depth = model.inter_depth if model.inter and model.facial and model.acoustic else 0
        self.inter = nn.ModuleList(AttentionUnit(model.hidden, model.hidden, model.hidden, model.heads) for _ in range(depth))
        self.map = mlp(model.hidden, 2 * model.hidden, model.latent)
        self.mlp = mlp(model.latent, 2 * model.latent, model.latent)

    def forward(self, streams: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """Stream name -> (batch, frames, width), to latents (batch, frames, latent); `hidden` (frames, frames) is not seen."""
        face, voice = (fuse(streams, hidden) if fuse is not None else None for fuse in (self.facial, self.acoustic))
        if face is None or voice is None:
            fused = face if voice is None else voice
        elif len(self.inter):
            fused = face
            for unit in self.inter:
                fused = unit(fused, voice, hidden)
        else:
            fused = face + voice
        return self.mlp(self.map(fused))


class _Sum(nn.Module):
    """No intra-class attention: each stream projected, and all of them added."""

    def __init__(self, model: config.Model, names: tuple[str, ...], widths: dict[str, int]):
        super().__init__()
        self.streams = nn.ModuleDict({name: nn.Linear(widths[name], model.hidden) for name in names})

    def forward(self, streams: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """Stream name -> (batch, frames, width), to (batch, frames, hidden)."""
        return torch.stack([projection(streams[name]) for name, projection in self.streams.items()]).sum(0)


class Fusion(nn.Module):
    """Intra-class attention: the first unit over one stream or two, then one unit for each further one attended to."""

    def __init__(self, model: config.Model, first: tuple[str, ...], rest: tuple[str, ...], widths: dict[str, int]):
        super().__init__()
        self.first_names, self.rest_names = first, rest
        attended = widths[first[1]] if len(first) > 1 else None
        self.first = AttentionUnit(widths[first[0]], attended, model.hidden, model.heads)
        self.rest = nn.ModuleList(AttentionUnit(model.hidden, widths[name], model.hidden, model.heads) for name in rest)

    def forward(self, streams: dict[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """Stream name -> (batch, frames, width), to (batch, frames, hidden)."""
        fused = self.first(*(streams[name] for name in self.first_names), hidden=hidden)
        for unit, name in zip(self.rest, self.rest_names, strict=True):
            fused = unit(fused, streams[name], hidden)
        return fused
