"""What stage 1 of every family leaves: the encoding of a person, on which the rest is built."""

import torch
from torch import Tensor, nn


class Codec(nn.Module):
    """A network that encodes persons; its forward is the loss of each item of a batch.

    Attributes:
        inputs: streams (or targets) that it reads of a person.
        width: features of an encoded frame.
    """

    inputs: tuple[str, ...]
    width: int

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Input name -> (batch, frames, width of the input), to encodings (batch, frames, width)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
