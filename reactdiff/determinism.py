"""Equal inputs give equal bits on equal devices."""

import torch


def make_deterministic(threads: int) -> None:
    """Use so many compute threads and only kernels whose results do not depend on their timing.

    On CUDA the environment must hold CUBLAS_WORKSPACE_CONFIG=:4096:8 before torch starts.
    """
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which also loads the compiler: a second of each start
    torch.backends.cudnn.benchmark = False
