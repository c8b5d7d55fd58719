"""Steps whose forward and backward torch's Inductor compiles (`workers.compile`): for one shape, the same bits each time."""

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from cluster.training.gradient import Tensors


def compile_step(stage: nn.Module, device: torch.device) -> None:
    """Have the first step compile forward and backward; a full share has the dropout of an uncompiled step.

    Args:
        stage: the module.
        device: it computes on.

    Raises:
        ValueError: if it is a GPU, and this machine cannot compile for one.
    """
    if device.type == "cuda":
        _assert_triton_builds()
    torch._inductor.config.fallback_random = True
    torch._inductor.config.deterministic = True  # or it times kernels on a GPU, and takes the one that was faster this time
    stage.compile(dynamic=False)


def _assert_triton_builds() -> None:
    """Triton, which makes a GPU's kernels, compiles what starts them when it is first used; without this that fails in the first step.

    Raises:
        ValueError: if there is no C compiler, or no header of this Python.
    """
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        lacking = "no C compiler"
    elif not header.exists():
        lacking = f"no {header}"
    else:
        return
    raise ValueError(f"workers.compile=true on GPUs, but host {platform.node()} has {lacking}: install gcc and python3-dev, or unset it")


def filled(batch: Tensors, items: int) -> Tensors:
    """A batch with as many items as the compiled one, those that were lacking of zeros and weight 0.

    For another shape it would be compiled again, in the midst of training, which would pass for a hang.
    """
    lacking = items - len(batch["weight"])
    return {name: torch.cat((value, value.new_zeros(lacking, *value.shape[1:]))) for name, value in batch.items()} if lacking else batch
