"""Activations that are computed again in the backward pass instead of kept: less memory, about a third more arithmetic, the same bits."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from reactdiff.model.attention import AttentionUnit
from reactdiff.model.transformer import Layer
from reactdiff.model.unet import Block

BLOCKS = (AttentionUnit, Block, Layer, nn.TransformerDecoderLayer)
"""What keeps only its input: the layers of which each network has many."""


def recompute(module: nn.Module) -> None:
    """Have each block of a module keep nothing but its input for the backward pass (Chen et al., 2016); dropout draws the same again."""
    for block in module.modules():
        if isinstance(block, BLOCKS):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
