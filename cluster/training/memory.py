"""Memory of a rank: its part of what is trained, from the number of parameters alone, and what its process holds beside its tensors."""

from cluster.data.stream import WINDOWS, steps_ahead
from cluster.training.engine import KINDS, zero_stage

BASE = 550_000_000
"""Bytes that the process of a rank holds before there is a model: Python, torch, DeepSpeed, Ray, gloo; measured on Linux."""


def beside_steps(parameters: int, ranks: int, batch_bytes: int, read_ahead: int) -> dict[str, int]:
    """Bytes of a rank's host memory that hold no tensor of a step.

    Args:
        parameters: of the stage.
        ranks: number of ranks.
        batch_bytes: of a rank's share of a step, as it is read.
        read_ahead: bytes that may be read before they are asked for.
    """
    return {
        "libraries": BASE,
        "read ahead": WINDOWS * steps_ahead(batch_bytes, read_ahead) * batch_bytes,
        "copy for checkpoints": 4 * len(KINDS) * -(-parameters // ranks),
    }


def memory_per_rank(parameters: int, zero: int, ranks: int, precision: str) -> dict[str, int]:
    """Bytes of training state on each rank, without activations and communication buffers.

    Args:
        parameters: of the stage.
        zero: DeepSpeed ZeRO stage.
        ranks: number of ranks.
        precision: "fp32", "tf32" or "bf16".
    """
    width, zero = 2 if precision == "bf16" else 4, zero_stage(zero, precision, ranks)
    own = parameters if zero == 0 else -(-parameters // ranks)
    return {
        "weights": width * (-(-parameters // ranks) if zero == 3 else parameters),
        "gradients": 4 * (-(-parameters // ranks) if zero >= 2 else parameters),
        "fp32 masters": 0 if zero == 0 else 4 * own,
        "Adam moments": 8 * own,
        "averaged weights": 4 * own,
    }
