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
    """Memory for one copy, used again for the next one of the same size: fresh pages would cost as much as the copy."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, tensors: Mapping[str, torch.Tensor]) -> memoryview:
        """Copy the tensors; what was taken before is overwritten.

        Args:
            tensors: by name, on any device.

        Returns:
            The file.
        """
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # whoever reads it in place finds all aligned
        places, end = {}, 0
        for name in order:
            places[name] = end, end + tensors[name].nbytes
            end += tensors[name].nbytes
        head = _header(tensors, places)
        if len(self._memory) != len(head) + end:
            self._memory = bytearray(len(head) + end)
        self._memory[: len(head)] = head
        for name in order:
            tensor, start = tensors[name].detach(), len(head) + places[name][0]
            if tensor.numel():
                copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                copy.view(tensor.shape).copy_(tensor)
        return memoryview(self._memory)


def _header(tensors: Mapping[str, torch.Tensor], places: Mapping[str, tuple[int, int]]) -> bytes:
    entries = {
        name: {"dtype": TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": list(place)}
        for name, place in places.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
