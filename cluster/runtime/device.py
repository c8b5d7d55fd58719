"""What a rank computes on: how much memory it used, how fast it could be."""

import resource
import sys

import torch

PEAK = {"H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12), "A10G": (70e12, 35e12), "L4": (121e12, 30e12)}
"""Device -> peak operations per second in bf16 and in fp32 without TF32, dense, from the makers' data sheets."""


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak operations per second of a device, 0 where it is not known (a CPU)."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peaks[0 if precision == "bf16" else 1] for key, peaks in PEAK.items() if key in name), 0.0)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held on the device so far; on a CPU its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
