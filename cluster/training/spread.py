"""Whole parameters out of the stretches of them that ranks hold."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def spread(stretches: Sequence[tuple[str, int, torch.Tensor]], module: nn.Module, gather: Callable[[Any], list[Any]]) -> None:
    """Give every rank's module the parameters of which each rank holds some stretches; collective, and in no more memory than theirs.

    Args:
        stretches: of this rank: parameter name, first element in the flattened parameter, and the elements, on any device; together
            those of all ranks cover each parameter once.
        module: whose parameters they are, on the device of the process group.
        gather: collects one object of every rank on all of them.
    """
    rank = dist.get_rank()
    for owner, extents in enumerate(gather([(name, start, values.numel()) for name, start, values in stretches])):
        for place, (name, start, count) in enumerate(extents):
            target = module.get_parameter(name).data.view(-1)[start : start + count]
            if owner == rank:
                target.copy_(stretches[place][2])
            dist.broadcast(target, owner)
