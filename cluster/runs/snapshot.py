"""A copy of a rank's tensors in host memory that is already the file they are kept as: each byte is copied once, and uploaded from there.

The file is safetensors (github.com/huggingface/safetensors, "Format"): 8 bytes with the length of the header, little-endian; the header in
JSON, name -> type, shape and place of each tensor, padded to 8 bytes; then the tensors without gaps.
"""

import json
from collections.abc import Mapping

import torch

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
"""Types of tensors by their names in the header."""


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
        self._views = {
            name: body[start:stop].view(tensors[name].dtype).view(tensors[name].shape) for name, (start, stop) in places.items()
        }

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
