"""Small pieces that several networks share."""

from torch import nn


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear - LayerNorm - SiLU - Linear, on the last axis."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class StartsAtZero(nn.Module):
    """What ends a residual branch, so that the branch starts as nothing."""

    def reset_parameters(self) -> None:
        """Sets every parameter to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroConv1d(StartsAtZero, nn.Conv1d):
    """A convolution that starts at zero."""


class ZeroLinear(StartsAtZero, nn.Linear):
    """A linear layer that starts at zero."""


def check_heads(field: str, width: int, heads: int, even: bool = False) -> None:
    """Checks that attention heads can share a width, and that each share is even where it must be.

    Raises:
        ValueError: if they cannot, naming the field of the width.
    """
    unit = 2 * heads if even else heads
    if width % unit:
        raise ValueError(
            f"{field} is {width}, which model.heads={heads} attention heads cannot share {'evenly' if even else 'equally'}; "
            f"make it a multiple of {unit}"
        )
