"""What the ranks tell each other in the one small all-reduce of a step."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from cluster.training.gradient import LARGEST_NORM


class Word(NamedTuple):
    """What a rank brings to the one small all-reduce of a step, beside the loss and the gradient's square.

    Attributes:
        ledger: sum of the CRC32C of the bytes the step was made of; exact below 2^53.
        next_valid: items of the next step that count.
        uploaded: whether the part of the checkpoint is uploaded; how many ranks' have.
        written: whether the manifest of the checkpoint is there, which rank 0 knows.
        next_corrupt: items of the next step that were found damaged.
        checkpoint: whether it is time for a checkpoint.
        leave: whether the driver asks the ranks to leave now, with a checkpoint.
        leave_at_checkpoint: whether it asks them to leave at the next one.
    """

    ledger: float
    next_valid: float
    uploaded: float
    written: float
    next_corrupt: float
    checkpoint: float
    leave: float
    leave_at_checkpoint: float

    def summed(self, loss: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The sums over all ranks, float64, loss and square first, on their device: nothing waits for them until `Verdict.read` does.

        Args:
            loss: this rank's part of the step's mean loss, a scalar.
            square: squared norm of its part of the gradient, a scalar.
        """
        numbers = torch.tensor(self, dtype=torch.float64).to(loss.device, non_blocking=True)
        sums = torch.cat([torch.stack([loss.double(), square.double()]), numbers])
        dist.all_reduce(sums)
        return sums


class Verdict(NamedTuple):
    """What all ranks know of a step after it: the norm of its gradient before clipping, and sums over the ranks."""

    loss: float
    gradient_norm: float
    of_all: Word

    @classmethod
    def read(cls, sums: torch.Tensor) -> "Verdict":
        """Wait for what `Word.summed` has made."""
        loss, square, *numbers = sums.tolist()
        return cls(loss, math.sqrt(square), Word(*numbers))

    @property
    def finite(self) -> bool:
        """Whether the step was applied."""
        return math.isfinite(self.loss) and self.gradient_norm <= LARGEST_NORM
