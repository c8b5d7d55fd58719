"""A rank's tensors and the file they are kept as: a copy in host memory that is that file, and the way back, without another copy.

The file is safetensors (github.com/huggingface/safetensors, "Format"): 8 bytes with the length of the header, little-endian; the header in
JSON, name -> type, shape and place of each tensor, padded to 8 bytes; then the tensors without gaps.
"""

import json
from collections.abc import Callable, Iterable, Mapping

import torch

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
"""Types of tensors by their names in the header."""

DTYPES = {name: dtype for dtype, name in TYPES.items()}


class TensorSnapshot:
    """Memory for one copy, used again for every one of the same layout: fresh pages cost up to ten times as much as the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, torch.Tensor] = {}

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the file but for the tensors' bytes, and get all of its memory from the kernel; other threads run meanwhile.

        Args:
            tensors: by name; types and shapes are what counts.
        """
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # whoever reads it in place finds all aligned
        places, end = {}, 0
        for name in order:
            places[name] = end, end + tensors[name].nbytes
            end += tensors[name].nbytes
        head = _header(tensors, places)
        self._views = {}
        self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory goes before there is more
        self._memory = memory = torch.empty(len(head) + end, dtype=torch.uint8).fill_(0)
        memory[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        body = memory[len(head) :]
        self._views = {name: body[start:stop].view(tensors[name].dtype).view(tensors[name].shape) for name, (start, stop) in places.items()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        """Copy the tensors; what was taken before is overwritten.

        Args:
            tensors: by name, on any device.

        Returns:
            The file.
        """
        if not self._fits(tensors):
            self.prepare(tensors)
        for name, view in self._views.items():
            view.copy_(tensors[name])
        return self._memory.numpy().data

    def view(self, name: str) -> torch.Tensor:
        """A tensor as it was taken last; it changes with the next `take`."""
        return self._views[name]

    def _fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the file has these tensors."""
        views = self._views
        return views.keys() == tensors.keys() and all(
            views[name].dtype == tensor.dtype and views[name].shape == tensor.shape for name, tensor in tensors.items()
        )


def _header(tensors: Mapping[str, torch.Tensor], places: Mapping[str, tuple[int, int]]) -> bytes:
    entries = {
        name: {"dtype": TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": list(place)}
        for name, place in places.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


LARGEST_HEADER = 100 << 20
"""Bytes of a header, at most; safetensors' own limit."""

Stretch = tuple[int, torch.Tensor]
"""First element of a tensor in a file, and the contiguous tensor, of its type, where the elements from there on belong."""


class TensorsInPlace:
    """Takes a file in pieces, from its first byte on, and puts the stretches of its tensors that are wanted where they belong.

    Args:
        wanted: name, type and shape of a tensor in the file -> the stretches of it that are wanted.

    Attributes:
        count: elements that were put somewhere; 0 as long as the header is not there, and where there is none that can be read.
    """

    def __init__(self, wanted: Callable[[str, torch.dtype, list[int]], Iterable[Stretch]]):
        self._wanted = wanted
        self._head, self._places = bytearray(), list[tuple[int, torch.Tensor]]()
        self.count = 0

    @torch.no_grad()
    def take(self, start: int, piece: memoryview) -> None:
        """The bytes that begin at this one; with those that begin at 0 the file begins anew."""
        if start == 0:
            self._head, self._places, self.count = bytearray(), [], 0
            self._reading_header = True
        if self._reading_header:
            self._head += piece
            if not self._read_header():
                return
            start, piece = 0, memoryview(self._head)  # some of it may be of tensors
        end = start + len(piece)
        for place, target in self._places:
            low, high = max(start, place), min(end, place + len(target))
            if low < high:
                target[low - place : high - place] = torch.frombuffer(piece[low - start : high - start], dtype=torch.uint8)

    def _read_header(self) -> bool:
        """Whether the header is there, or can be none."""
        if len(self._head) < 8:
            return False
        length = int.from_bytes(self._head[:8], "little")
        if length <= LARGEST_HEADER and len(self._head) < 8 + length:
            return False
        self._reading_header = False
        try:
            entries = json.loads(self._head[8 : 8 + length])
            for name, entry in entries.items():
                dtype, begin = DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0]
                for first, target in self._wanted(name, dtype, entry["shape"]):
                    self._places.append((begin + first * dtype.itemsize, target.view(-1).view(torch.uint8)))
                    self.count += target.numel()
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError):  # its hash will not be the right one
            self._places, self.count = [], 0
        return True
