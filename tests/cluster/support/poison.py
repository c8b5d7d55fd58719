"""Gradients that are no numbers, of items whose loss is one."""

from typing import Any

import torch


class Poison(torch.autograd.Function):
    """The identity on losses; their gradients are multiplied by factors."""

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None
