"""Memory of a rank's part of what is trained, worked out from the numbers of parameters alone."""

from collections.abc import Sequence

from cluster.training.settings import EngineSettings

OFFLOADED = {
    "none": (),
    "optimizer": ("gradients", "fp32 masters", "Adam moments", "averaged weights"),
    "all": ("weights", "gradients", "fp32 masters", "Adam moments", "averaged weights"),
}
"""What of it lies in host memory, by `workers.offload`."""


def memory_per_rank(parameters: int, settings: EngineSettings, ranks: int) -> dict[str, int]:
    """Bytes of training state on each rank, without activations and communication buffers.

    Args:
        parameters: of the stage.
        settings: of its engine.
        ranks: number of ranks.
    """
    width, zero = 2 if settings.precision == "bf16" else 4, settings.zero
    own = parameters if zero == 0 else -(-parameters // ranks)
    return {
        "weights": width * (-(-parameters // ranks) if zero == 3 else parameters),
        "gradients": 4 * (-(-parameters // ranks) if zero >= 2 else parameters) * (1 if settings.offload == "none" else 2),
        "fp32 masters": 0 if zero == 0 else 4 * own,
        "Adam moments": 8 * own,
        "averaged weights": 4 * own * len(settings.decays(1)),
    }


def offloaded_per_rank(parameters: int, settings: EngineSettings, ranks: int) -> int:
    """Bytes of it that are in host memory and not on a GPU."""
    each = memory_per_rank(parameters, settings, ranks)
    return sum(each[what] for what in OFFLOADED[settings.offload])


def host_memory_per_rank(sizes: Sequence[int], settings: EngineSettings, ranks: int) -> int:
    """Bytes of host memory that a GPU's rank takes for what is offloaded, of which gradients and weights are pinned.

    Weights are pinned twice: a parameter each, then all in one. Torch keeps the first.

    Args:
        sizes: elements of each parameter of the stage.
        settings: of its engine.
        ranks: number of ranks.
    """
    each = memory_per_rank(sum(sizes), settings, ranks)
    taken = {**each, "gradients": 2 * pinned(each["gradients"] // 2), "weights": pinned(each["weights"])}
    if settings.offload == "all":
        width = each["weights"] // -(-sum(sizes) // ranks)
        taken["weights"] += sum(pinned(width * -(-size // ranks)) for size in sizes)
    return sum(taken[what] for what in OFFLOADED[settings.offload])


def pinned(size: int) -> int:
    """Bytes that torch takes of the host for so many that are pinned: a power of two."""
    return 1 << (size - 1).bit_length() if size else 0
