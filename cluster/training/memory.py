"""Memory of a rank's part of what is trained, worked out from the number of parameters alone."""

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
    """Bytes of it that lie in host memory beside a GPU."""
    each = memory_per_rank(parameters, settings, ranks)
    return sum(each[what] for what in OFFLOADED[settings.offload])
