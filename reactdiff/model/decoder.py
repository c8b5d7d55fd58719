"""The decoder: from latent frames back to attributes and coefficients."""

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import AU, EXPRESSION, TARGETS, VALENCE_AROUSAL
from reactdiff.model.layers import check_heads, mlp

STACKS = 2
LAYERS = 2


class Decoder(nn.Module):
    """Two stacks of post-norm Transformer decoder layers, and one head per target; linear, unless `model.bounded`."""

    def __init__(self, model: config.Model):
        super().__init__()
        check_heads("model.latent", model.latent, model.heads)
        self.stacks = nn.Sequential(*(Stack(model) for _ in range(STACKS)))
        self.bounded = model.bounded
        self.heads = nn.ModuleDict({name: mlp(model.latent, 2 * model.latent, width) for name, width in TARGETS.items()})

    def forward(self, latent: Tensor, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, frames, latent) -> attributes (batch, frames, 25) and coefficients (batch, frames, 58).

        Of `hidden` (frames, frames), true is what a frame must not see.
        """
        for stack in self.stacks:
            latent = stack(latent, hidden)
        targets = {name: head(latent) for name, head in self.heads.items()}
        return targets | {"attributes": bounded(targets["attributes"])} if self.bounded else targets


def bounded(attributes: Tensor) -> Tensor:
    """Any numbers (..., 25) to attributes: units in [0, 1], valence and arousal in [-1, 1], expressions that sum to 1."""
    parts = attributes[..., AU].sigmoid(), attributes[..., VALENCE_AROUSAL].tanh(), attributes[..., EXPRESSION].softmax(-1)
    return torch.cat(parts, dim=-1)


class Stack(nn.Module):
    """Decoder layers whose first target and only memory is the input; no position, no norm at the end."""

    def __init__(self, model: config.Model):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(model.latent, model.heads, 2 * model.latent, model.dropout, batch_first=True) for _ in range(LAYERS)
        )

    def forward(self, memory: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(batch, frames, latent) -> (batch, frames, latent)."""
        target = memory
        for layer in self.layers:
            target = layer(target, memory, hidden, hidden)
        return target
