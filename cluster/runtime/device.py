"""What a rank or a task computes on: where that is decided, how much memory it used, how fast it could be."""

import re
import resource
import sys

import torch

from cluster.config.schema import Workers

PEAK = {
    "GH200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H200 NVL": {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "H100 NVL": {"bf16": 835e12, "tf32": 417e12, "fp32": 60e12},
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12},
    "A10G": {"bf16": 70e12, "tf32": 35e12, "fp32": 35e12},
    "L4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30e12},
}
"""Words of a device's name -> precision -> peak operations per second, dense, from the makers' data sheets; the first that fits counts."""


def worker_environment(workers: Workers) -> dict[str, str]:
    """What the process of a rank or a task needs before torch is imported; where it computes is decided here, by `workers.gpu`.

    A process that asked Ray for no GPU sees all of its machine's, and DeepSpeed takes one wherever it sees one, beside Ray's gloo.
    """
    where = {"DS_ACCELERATOR": "cuda"} if workers.gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**where, "OMP_NUM_THREADS": str(workers.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def best_device() -> torch.device:
    """The GPU if this process sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak operations per second of a device, 0 where it is not known: of a CPU, of a part of a GPU (MIG), of one that is not in PEAK."""
    if device.type != "cuda":
        return 0.0
    words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    return 0.0 if "MIG" in words else next((peaks[precision] for name, peaks in PEAK.items() if words.issuperset(name.split())), 0.0)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held on the device so far; on a CPU its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
