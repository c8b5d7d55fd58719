"""No first stage: a person's encoding is its attributes, coefficients and streams as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reactdiff import config
from reactdiff.clip import TARGETS
from reactdiff.data.sample import StreamSpec
from reactdiff.model.autoencoder import widths_of
from reactdiff.model.codec import Codec


class RawStreams(Codec):
    """Puts side by side what a person shows and the streams of it that others have; there are no weights, but where each part lies.

    Args:
        model: which streams to keep.
        streams: the streams the dataset has; they say how wide each one is.

    Raises:
        ValueError: if the dataset lacks a stream that `model` names.
    """

    def __init__(self, model: config.Model, streams: Sequence[StreamSpec]):
        super().__init__()
        self.widths = TARGETS | widths_of(model, streams)
        self.width = sum(self.widths.values())
        begin = 0
        for name, width in self.widths.items():  # all that it is, so that exports of different ones differ
            self.register_buffer(name, torch.tensor([begin, width]))
            begin += width

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Name -> (batch, frames, width), to [attributes | coefficients | streams] (batch, frames, width) float32."""
        return torch.cat([streams[name].float() for name in self.inputs], dim=-1)

    def listen(self, streams: dict[str, Tensor]) -> Tensor:
        """The encoding of a speaker whose attributes and coefficients nobody knows: zeros stand for them."""
        heard = torch.cat([streams[name].float() for name in self.inputs if name not in TARGETS], dim=-1)
        return torch.cat((heard.new_zeros(*heard.shape[:-1], sum(TARGETS.values())), heard), dim=-1)

    def decode(self, encoding: Tensor) -> dict[str, Tensor]:
        """The first features of an encoding (batch, frames, 83 or more), named."""
        parts = encoding[..., : sum(TARGETS.values())].split(tuple(TARGETS.values()), dim=-1)
        return dict(zip(TARGETS, parts, strict=True))

    @property
    def parts(self) -> dict[str, int]:
        """Targets, then streams."""
        return self.widths

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device
