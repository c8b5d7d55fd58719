"""Small pieces that several networks share."""

import torch
from torch import Tensor, nn


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear - LayerNorm - SiLU - Linear, on the last axis."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, outputs))


# Cells rather than nn.GRU: cuDNN's wants all weights side by side in memory, where an optimiser that shards them does not leave them.
def last_state(cell: nn.GRUCell, sequence: Tensor) -> Tensor:
    """The state (batch, state) of a recurrent cell after the last frame of (batch, frames, features); it begins at 0."""
    state = sequence.new_zeros(len(sequence), cell.hidden_size)
    for frame in sequence.unbind(1):
        state = cell(frame, state)
    return state


def unrolled(cell: nn.GRUCell, given: Tensor, frames: int) -> Tensor:
    """The states (batch, frames, state) of a recurrent cell that begins at 0 and is given the same (batch, features) at every frame."""
    states = [given.new_zeros(len(given), cell.hidden_size)]
    for _ in range(frames):
        states.append(cell(given, states[-1]))
    return torch.stack(states[1:], dim=1)


def reparameterised(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """The draw from normal distributions that this standard normal noise stands for (Kingma and Welling, 2014)."""
    return mean + (log_variance / 2).exp() * noise


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback and Leibler's, of each normal variable from the standard one."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


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
