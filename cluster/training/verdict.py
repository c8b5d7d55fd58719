"""What the ranks tell each other in the one small all-reduce of a step."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from cluster.training.engine import LARGEST_NORM


class Verdict(NamedTuple):
    """What a rank brings to the one small all-reduce of a step, and summed over the ranks what all of them know after it.

    Attributes:
        loss: of this step, the part of the mean.
        gradient_square: of this step, the squared norm of the part of the gradient that the rank owns.
        ledger: sum of the CRC32C of the bytes the step was made of; exact below 2^53.
        next_valid: items of the next step that count.
        uploaded: whether the part of the checkpoint is uploaded; how many ranks' have.
        written: whether the manifest of the checkpoint is there, which rank 0 knows.
        next_corrupt: items of the next step that were found damaged.
        checkpoint: whether it is time for a checkpoint.
        leave: whether the driver asks the ranks to leave now, with a checkpoint.
        leave_at_checkpoint: whether it asks them to leave at the next one.
    """

    loss: float
    gradient_square: float
    ledger: float
    next_valid: float
    uploaded: float
    written: float
    next_corrupt: float
    checkpoint: float
    leave: float
    leave_at_checkpoint: float

    def summed(self, device: torch.device) -> "Verdict":
        """The sums over all ranks."""
        sums = torch.tensor(self, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return Verdict(*sums.tolist())

    @property
    def gradient_norm(self) -> float:
        """Norm of the step's gradient over all ranks, before clipping."""
        return math.sqrt(self.gradient_square)

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and self.gradient_norm <= LARGEST_NORM
