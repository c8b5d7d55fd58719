"""Memory of a rank's part of what is trained, worked out from the number of parameters alone."""

from cluster.training.engine import zero_stage


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
