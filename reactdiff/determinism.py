"""Equal inputs give equal bits on equal devices."""

from typing import Any

import torch
import torch.utils.deterministic


def make_deterministic(threads: int, tf32: bool = False) -> None:
    """Use so many compute threads and only kernels whose results do not depend on their timing.

    On CUDA the environment must hold CUBLAS_WORKSPACE_CONFIG=:4096:8 before torch starts.

    Args:
        threads: of this process.
        tf32: whether a GPU may round fp32 factors of matrix products and convolutions to 10 bits; torch allows it for convolutions unasked.
    """
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which also loads the compiler: a second of each start
    # To fill fresh memory with NaN finds mistakes, and costs thousands of kernels in each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    backends: Any = torch.backends
    for kernels in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        kernels.fp32_precision = "tf32" if tf32 else "ieee"
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # or cuBLAS may add parts of a product in bf16
