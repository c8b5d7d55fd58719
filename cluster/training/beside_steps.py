"""What a rank holds beside the tensors of its steps, in host memory and on a GPU."""

from collections.abc import Sequence

from cluster.data.stream import WINDOWS, steps_ahead
from cluster.training.memory import pinned
from cluster.training.settings import EngineSettings
from cluster.training.zero import bucket_elements

BASE = 550_000_000
"""Bytes that the process of a rank holds before there is a model: Python, torch, DeepSpeed, Ray, gloo; measured on Linux."""


def beside_steps(parameters: int, kinds: int, ranks: int, arrays: Sequence[int], read_ahead: int, gpu: bool = False) -> dict[str, int]:
    """Bytes of a rank's host memory that hold no tensor of a step.

    Args:
        parameters: of the stage.
        kinds: values that a checkpoint keeps of each.
        ranks: number of ranks.
        arrays: bytes of each array of a rank's share of a step, as it is read.
        read_ahead: bytes that may be read before they are asked for.
        gpu: whether it computes on one, for which they are read into pinned memory.
    """
    windows = [steps_ahead(sum(arrays), read_ahead) * array for array in arrays]
    return {
        "libraries": BASE,
        "read ahead": WINDOWS * sum(map(pinned, windows) if gpu else windows),
        "copy for checkpoints": 4 * kinds * -(-parameters // ranks),
    }


def beside_steps_on_gpu(settings: EngineSettings, sizes: Sequence[int], ranks: int, batch_bytes: int, scored: int) -> dict[str, int]:
    """Bytes of a rank's GPU that a step without memory, on a CPU, knows nothing of.

    Args:
        settings: of the engine.
        sizes: elements of each parameter of the stage.
        ranks: number of ranks.
        batch_bytes: of a rank's share of a step.
        scored: parameters of a copy of the model that is scored while it is trained.
    """
    more, width = 0, 2 if settings.precision == "bf16" and settings.zero == 2 else 4
    if settings.zero and ranks > 1:  # ZeRO-1 and 2 fill one bucket while another is reduced
        more = width * ((1 if settings.zero == 3 else 2) * bucket_elements(sizes, True) - bucket_elements(sizes, False))
    return {"buckets": more, "two batches": 2 * batch_bytes, "copy that is scored": 4 * scored}
