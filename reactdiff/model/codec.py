"""What stage 1 of every family leaves: the encoding of a person, on which the rest is built."""

import torch
from torch import Tensor, nn

LATENT = "latent"
"""The one part of an encoding by a first stage."""


class Codec(nn.Module):
    """A network that encodes persons; its forward is the loss of each item of a batch.

    Attributes:
        widths: of the streams (or targets) that it reads of a person, by name.
        width: features of an encoded frame.
        encoder_reach: frames before a chunk, or a window, that its encoding online depends on.
        decoder_reach: the same of decoding.
    """

    widths: dict[str, int]
    width: int
    encoder_reach = 0
    decoder_reach = 0

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Input name -> (batch, frames, width of the input), to encodings (batch, frames, width)."""
        raise NotImplementedError

    def decode(self, encoding: Tensor) -> dict[str, Tensor]:
        """Encodings (batch, frames, width), or the drawn part of them, to what a person shows, one tensor (batch, frames, ...) each."""
        raise NotImplementedError

    def listen(self, streams: dict[str, Tensor]) -> Tensor:
        """The encoding of a person who only speaks."""
        return self.encode(streams)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads of a person."""
        return tuple(self.widths)

    @property
    def parts(self) -> dict[str, int]:
        """What an encoded frame consists of, and the features of each."""
        return {LATENT: self.width}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
