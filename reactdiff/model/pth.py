"""Weights that other programs left with `torch.save`: read as tensors and plain values, never unpickled into anything else."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA_PARALLEL = "module."
"""What PyTorch's DataParallel puts before every name."""


@dataclass(frozen=True)
class Pth:
    """A file of weights.

    Attributes:
        path: where it is.
        weights: its state dict, by name; without the prefix of DataParallel, where all names have it.
        content: all it holds; the weights are its `state_dict`, or, where it has none, it is the weights.
    """

    path: Path
    weights: dict[str, Tensor]
    content: Mapping[str, Any]


def read_pth(path: Path) -> Pth:
    """Read a file of weights, all its checksums compared; what is not used (an optimiser's moments) stays on the disk.

    Raises:
        ValueError: if the file is missing, damaged, holds no weights, or holds what only unpickling could read.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: correct the path of the weights")
    archive = zipfile.is_zipfile(path)
    try:
        if archive and (member := _damaged(path)):
            raise zipfile.BadZipFile(f"bytes of {member} are not those that were written")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{foreign[1]} objects" if foreign else "no weights of PyTorch, or something beside them"
        raise ValueError(
            f"{path} holds {what}, and only tensors and plain values are read: unpickling could run any code. "
            "Save it again with nothing else, where it was made"
        ) from None
    except Exception as error:  # what a damaged file leads PyTorch to raise is of any kind
        raise ValueError(
            f"{path} is cut off, damaged or no file of torch.save ({type(error).__name__}): copy it again from where it came from"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"the keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {found[:200]}, but weights are a mapping of names to tensors, plain or under `state_dict`")
    prefix = DATA_PARALLEL if all(name.startswith(DATA_PARALLEL) for name in state) else ""
    return Pth(path, {name.removeprefix(prefix): value for name, value in state.items()}, content)


def _damaged(path: Path) -> str | None:
    """The first member whose CRC-32 is not that of its bytes; torch.load does not look."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()
