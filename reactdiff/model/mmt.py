"""The encoder: the Multi-Modality Transformer, from a person's feature streams to latent frames."""

from torch import Tensor, nn

from reactdiff import config
from reactdiff.model.attention import AttentionUnit
from reactdiff.model.layers import check_heads, mlp


class MultiModalityTransformer(nn.Module):
    """Fuses the streams of each class, then face with voice, and maps every frame to a latent (Li et al., 2025, MMT).

    Facial: the first stream attends to itself, then for `intra_depth` rounds to each other one. Acoustic: the first attends
    to the second, or to itself where it is alone, then to any more. Then the face attends to the voice `inter_depth` times.

    Args:
        model: names of the streams, widths and depths.
        widths: width of every stream that `model` names.

    Raises:
        ValueError: if `model.hidden` does not divide into heads.
    """

    def __init__(self, model: config.Model, widths: dict[str, int]):
        super().__init__()
        check_heads("model.hidden", model.hidden, model.heads)
        self.facial = _Fusion(model, model.facial[:1], model.facial[1:] * model.intra_depth, widths)
        self.acoustic = _Fusion(model, model.acoustic[:2], model.acoustic[2:], widths)
        self.inter = nn.ModuleList(AttentionUnit(model.hidden, model.hidden, model.hidden, model.heads) for _ in range(model.inter_depth))
        self.map = mlp(model.hidden, 2 * model.hidden, model.latent)
        self.mlp = mlp(model.latent, 2 * model.latent, model.latent)

    def forward(self, streams: dict[str, Tensor]) -> Tensor:
        """Stream name -> (batch, frames, width), to latents (batch, frames, latent)."""
        face, voice = self.facial(streams), self.acoustic(streams)
        for unit in self.inter:
            face = unit(face, voice)
        return self.mlp(self.map(face))


class _Fusion(nn.Module):
    """Intra-class attention: the first unit over one stream or two, then one unit for each further one attended to."""

    def __init__(self, model: config.Model, first: tuple[str, ...], rest: tuple[str, ...], widths: dict[str, int]):
        super().__init__()
        self.first_names, self.rest_names = first, rest
        attended = widths[first[1]] if len(first) > 1 else None
        self.first = AttentionUnit(widths[first[0]], attended, model.hidden, model.heads)
        self.rest = nn.ModuleList(AttentionUnit(model.hidden, widths[name], model.hidden, model.heads) for name in rest)

    def forward(self, streams: dict[str, Tensor]) -> Tensor:
        """Stream name -> (batch, frames, width), to (batch, frames, hidden)."""
        fused = self.first(*(streams[name] for name in self.first_names))
        for unit, name in zip(self.rest, self.rest_names, strict=True):
            fused = unit(fused, streams[name])
        return fused
