"""Stage 1: a person's streams to latent frames, and back to that same person's attributes and coefficients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reactdiff import config
from reactdiff.clip import WINDOW, windows_of
from reactdiff.data.sample import StreamSpec
from reactdiff.model.codec import Codec
from reactdiff.model.decoder import LAYERS, STACKS, Decoder
from reactdiff.model.mmt import MultiModalityTransformer


class Autoencoder(Codec):
    """The Multi-Modality Transformer and its decoder. Inputs of any float type are cast to that of the weights.

    Attention runs over all frames of a clip. Online it runs over each window by itself, so that nothing later is seen; where chunks are
    shorter than windows, a frame sees its own chunk and the 2 s before that.

    Args:
        model: which streams to read, widths and depths.
        streams: the streams the dataset has; they say how wide each one is.

    Raises:
        ValueError: if the dataset lacks a stream that `model` names, or a width does not divide into heads.
    """

    def __init__(self, model: config.Model, streams: Sequence[StreamSpec]):
        super().__init__()
        self.widths, self.width, self.online = widths_of(model, streams), model.latent, model.online
        self.chunk = model.chunk
        if self.online and self.chunk < WINDOW:
            # An attended stream or latent sees 2 s itself: what a frame depends on reaches back once for each attention in a row.
            self.encoder_reach, self.decoder_reach = 2 * WINDOW, STACKS * LAYERS * WINDOW
        self.encoder = MultiModalityTransformer(model, self.widths)
        self.decoder = Decoder(model)

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Stream name -> (batch, frames, width), to latents (batch, frames, latent); streams that are no inputs are not read."""
        first = streams[self.inputs[0]]
        read = {name: self._cut(streams[name].to(self._dtype)) for name in self.inputs}
        return self._join(self.encoder(read, self._hidden(first)), first.shape[1])

    def decode(self, latent: Tensor) -> dict[str, Tensor]:
        """(batch, frames, latent) -> attributes (batch, frames, 25) and coefficients (batch, frames, 58)."""
        decoded = self.decoder(self._cut(latent.to(self._dtype)), self._hidden(latent))
        return {name: self._join(target, latent.shape[1]) for name, target in decoded.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 L1(attributes) + 10 MSE(coefficients) of each item, in float32.

        Args:
            batch: the input streams (batch, frames, width) and both targets (batch, frames, 25) and (batch, frames, 58).

        Returns:
            (batch,); an empty batch has an empty loss, through which zeros flow back.
        """
        output = self.decode(self.encode(batch))
        attributes, coefficients = (output[name].float() - batch[name].float() for name in ("attributes", "coefficients"))
        return 10 * attributes.abs().mean((1, 2)) + 10 * coefficients.square().mean((1, 2))

    forward = loss

    def _cut(self, x: Tensor) -> Tensor:
        """Online in windows, (batch, frames, width) -> (batch * windows, 50, width); otherwise, clips stay whole."""
        return x.unflatten(1, (windows_of(x.shape[1]), WINDOW)).flatten(0, 1) if self.online and self.chunk == WINDOW else x

    def _hidden(self, x: Tensor) -> Tensor | None:
        """Online in shorter chunks, what each frame of (batch, frames, width) must not see, (frames, frames)."""
        if not self.online or self.chunk == WINDOW:
            return None
        frame = torch.arange(x.shape[1], device=x.device)
        begin = (frame // self.chunk * self.chunk)[:, None]
        return (frame >= begin + self.chunk) | (frame < begin - WINDOW)

    def _join(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of `_cut`."""
        return x.reshape(x.shape[0] * x.shape[1] // frames, frames, x.shape[-1])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def widths_of(model: config.Model, streams: Sequence[StreamSpec]) -> dict[str, int]:
    """Width of every input stream, as the dataset says."""
    there: dict[tuple[str, str], int] = {(stream.kind, stream.name): stream.width for stream in streams}
    wanted = [("facial", name) for name in model.facial] + [("acoustic", name) for name in model.acoustic]
    for kind, name in wanted:
        if (kind, name) not in there:
            known = ", ".join(f"{stream.name} ({stream.kind}, {stream.width})" for stream in streams) or "none"
            raise ValueError(
                f"model.{kind} names the stream {name!r}, but the dataset has no {kind} stream of that name; it has: {known}. "
                f"Name one of these in model.{kind}, or prepare the dataset with {name!r}."
            )
    return {name: there[kind, name] for kind, name in wanted}
