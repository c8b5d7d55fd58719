"""On the PYTHONPATH of a run, makes its machine one with a GPU, as far as a program can ask without using it.

torch and Ray find one card, where CUDA_VISIBLE_DEVICES does not hide it; whatever is sent there fails, since there is none.
"""

import os
from typing import Any

from cluster.runtime.after_import import after_import


def visible() -> int:
    """What CUDA would find."""
    return len([card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") if card == "0"])


def pretend(torch_cuda: Any) -> None:
    """What torch is asked before it uses a card."""
    torch_cuda.is_available = lambda: visible() > 0
    torch_cuda.device_count = visible


def found(nvidia: Any) -> None:
    """What Ray asks when a node starts."""
    nvidia.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: 1)
    nvidia.NvidiaGPUAcceleratorManager.get_current_node_accelerator_type = staticmethod(lambda: None)


after_import("torch.cuda", pretend)
after_import("ray._private.accelerators.nvidia_gpu", found)
