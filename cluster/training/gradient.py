"""The gradient of a step: its norm, and whether it may be applied."""

from collections.abc import Sequence

import torch

LARGEST_NORM = 1e19
"""Of a gradient that may be applied. Adam keeps the squares in fp32, where those of a larger one are infinite, and stay so.

Of smaller ones no update moves a weight by more than about ten learning rates, which are finite: weights stay finite.
"""

Tensors = dict[str, torch.Tensor]


class NonFinite(RuntimeError):
    """A loss or gradient is not a number any more; says of which step, and which of its items are to blame.

    Attributes:
        items: the numbers of those; none where it is the weights.
    """

    failure = "non_finite"

    def __init__(self, text: str, items: Sequence[int] = ()):
        super().__init__(text)
        self.items = tuple(items)


def finite(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Whether a step with this loss and gradient norm may be applied; all are scalars."""
    return loss.isfinite() & (norm <= LARGEST_NORM)


def squared_norm(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of the squares of all elements, a float64 on their device; not finite if one of them is not."""
    parts = [gradient for gradient in gradients if gradient.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts, 2, torch.float32)).double().square().sum().to(device)
