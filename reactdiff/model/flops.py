"""Floating point operations of training, counted on the module itself."""

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(module: nn.Module, item: dict[str, Tensor]) -> int:
    """Operations of forward and backward for one item (matrix products only); of what enters a module nobody takes the gradient.

    Args:
        module: on the meta device; its forward gives the loss of a batch.
        item: a batch of one item, on the meta device.
    """
    with FlopCounterMode(display=False) as counter:
        module(item).sum().backward()
    return counter.get_total_flops()
