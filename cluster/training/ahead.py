"""Batches on the device before they are needed: copied beside the step before, on a stream of their own."""

from typing import Protocol

import torch

from cluster.training.gradient import Tensors


class HostBatch(Protocol):
    """What is known here of a step's batch."""

    @property
    def step(self) -> int:
        """Which step."""

    @property
    def tensors(self) -> Tensors:
        """In pinned memory where there is a GPU."""


class Ahead:
    """Copies of the batch that is trained on and of the next one; on a CPU there is nothing to copy."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies: dict[int, Tensors] = {}

    def copy(self, batch: HostBatch) -> None:
        """Begin to copy a batch, whose memory is pinned; again if it has changed. The batch has to live until its step is over."""
        with torch.cuda.stream(self._stream):
            self._copies[batch.step] = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.tensors.items()}

    def take(self, batch: HostBatch) -> Tensors:
        """The tensors of a batch on the device; what is queued there from now on finds them whole."""
        tensors = self._copies[batch.step]
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            for tensor in tensors.values():
                tensor.record_stream(now)
        return tensors

    def drop(self, batch: HostBatch) -> None:
        """Let go of a batch whose step is over."""
        del self._copies[batch.step]
