"""Which items of a step are not finite by themselves: each is computed once more, alone, with the weights of now."""

import math

import torch
from torch import nn

from cluster.training.engine import LARGEST_NORM, Tensors, squared_norm


def examine(module: nn.Module, batch: Tensors, items: int, seed: int) -> dict[int, str]:
    """What is wrong with the items of a batch.

    Args:
        module: the stage with its weights, without an engine around it; its gradients are lost.
        batch: tensors of some items, with a `weight` of 0 or 1 for each; those of weight 0 are not looked at.
        items: the denominator of the loss, so that an item weighs what it weighs in its step.
        seed: of dropout, anew for each item; its masks are not those of the step, which are for all its items together.

    Returns:
        row -> "its loss is ..." or "its gradient has norm ...", of those that have either.
    """
    wrong = {}
    for row in torch.nonzero(batch["weight"]).flatten().tolist():
        torch.manual_seed(seed)
        module.zero_grad()
        loss = module({name: tensor[row : row + 1] for name, tensor in batch.items() if name != "weight"}).sum() / items
        if not torch.isfinite(loss):
            wrong[row] = f"its loss is {float(loss.detach())}"
            continue
        loss.backward()
        norm = math.sqrt(squared_norm([p.grad for p in module.parameters() if p.grad is not None], loss.device))
        if not norm <= LARGEST_NORM:
            wrong[row] = f"its gradient has norm {norm:.3g}"
    return wrong
