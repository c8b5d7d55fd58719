"""Equal inputs give equal bits on equal devices."""

import torch


def make_deterministic(threads: int) -> None:
    """Use so many compute threads and only kernels whose results do not depend on their timing.

    On CUDA the environment must hold CUBLAS_WORKSPACE_CONFIG=:4096:8 before torch starts.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
