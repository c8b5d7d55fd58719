"""The file formats of the official tree, each read whole and checked, nothing unpickled.

Every reader returns an array of rows or raises a `ValueError` that states the broken rule; who asked knows clip and file.
"""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch

from reactdiff.data.mfcc import mfcc


class ClipError(ValueError):
    """A clip that cannot be used: its key, the file at fault (relative to the tree), and the rule it breaks."""

    def __init__(self, key: str, file: str, rule: str):
        super().__init__(key, file, rule)
        self.key, self.file, self.rule = key, file, rule

    def __str__(self) -> str:
        return f"clip {self.key}: {self.file}: {self.rule}"


def read_csv(file: Path) -> np.ndarray:
    """The numbers below a CSV's header row, (rows, columns) float64."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()[1:]
    if not any(line.strip() for line in lines):
        raise ValueError("there are no rows below the header")
    try:
        return np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"every row must hold the same number of numbers ({error})") from error


def read_npy(file: Path) -> np.ndarray:
    """The numeric array of a `.npy` file, of any shape."""
    content = io.BytesIO(file.read_bytes())
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # the bytes are here: whatever the parser raises, they are at fault
        raise ValueError(f"this is no whole .npy file of plain numbers ({error})") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the array holds {array.dtype}, not numbers")
    return array


def read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tensors (rows, width) float32 of a `.pth` list, by name."""
    content = io.BytesIO(file.read_bytes())
    try:
        tensors = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # as above; torch's own words advise to unpickle, so they are not repeated
        raise ValueError("this is no whole .pth file of plain tensors: it is truncated or would need unpickling") from error
    expected = f"a list of {len(names)} tensors (rows, width): {', '.join(names)}"
    if not isinstance(tensors, list | tuple) or len(tensors) != len(names):
        raise ValueError(f"it must hold {expected}")
    if not all(isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and not tensor.is_complex() for tensor in tensors):
        raise ValueError(f"it must hold {expected}")
    return {name: tensor.detach().float().numpy() for name, tensor in zip(names, tensors, strict=True)}


def read_wav(file: Path) -> np.ndarray:
    """The MFCC (rows, 26) of a `.wav` file, channels averaged."""
    _refuse_truncated(file)
    try:
        sound, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"this is no readable sound file ({error.error_string})") from error
    return mfcc(sound.mean(axis=1), rate)


def _refuse_truncated(file: Path) -> None:
    """Compare a RIFF file's stated size with its real one: the decoder would silently return what is left."""
    with file.open("rb") as stream:
        head = stream.read(8)
    stated = int.from_bytes(head[4:8], "little") + 8
    streamed = head[4:8] == b"\xff\xff\xff\xff"  # written to a pipe, size unknown
    if len(head) < 8 or (head[:4] == b"RIFF" and not streamed and stated > file.stat().st_size):
        raise ValueError(f"the file is truncated: it has {file.stat().st_size} bytes and its header promises {stated}")
