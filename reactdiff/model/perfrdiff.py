"""The peer PerFRDiff: windows of attributes denoised under what the speaker did one window before; no personal hypernetwork.

Stage 1 finds a latent for each window of attributes; stage 2 denoises the listener's attributes themselves. Whoever calls
`SpeakerTokens` gives it the window before, which makes the peer online by construction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW, windows_of
from reactdiff.data.sample import StreamSpec
from reactdiff.model.autoencoder import widths_of
from reactdiff.model.codec import Codec
from reactdiff.model.layers import ZeroLinear, check_heads, last_state, unrolled
from reactdiff.model.unet import sinusoid

HIDDEN_TOKENS = 0.2
"""Probability that a kind of token is hidden from a window in training."""


class AttributeAutoencoder(Codec):
    """Stage 1: a recurrent autoencoder (GRU; Cho et al., 2014) of windows of 50 frames of attributes.

    The encoding of a person is its attributes, coefficients and acoustic streams as they are, then the latent of each window
    beside all of its frames.

    Args:
        model: which acoustic streams to keep, and the width of the latent.
        streams: the streams the dataset has; they say how wide each one is.

    Attributes:
        width: of one frame of the encoding.
        target: how many of its first features are the reaction.

    Raises:
        ValueError: if `model` names no acoustic stream, or one that the dataset lacks.
    """

    target = TARGETS["attributes"]

    def __init__(self, model: config.Model, streams: Sequence[StreamSpec]):
        super().__init__()
        if not model.acoustic:
            raise ValueError("model.acoustic is empty, but model.family=perfrdiff listens to the speaker: name at least one stream in it")
        acoustic = widths_of(model.model_copy(update={"facial": ()}), streams)
        self.widths = TARGETS | acoustic
        self.width = sum(_parts(model, sum(acoustic.values())))
        self.encoder = nn.GRUCell(self.target, model.latent)
        self.decoder = nn.GRUCell(model.latent, model.latent)
        self.out = nn.Linear(model.latent, self.target)

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Stream name -> (batch, frames, width), to [attributes | coefficients | acoustic | latent] (batch, frames, width) float32.

        Raises:
            ValueError: if the frames do not divide into windows.
        """
        latent = self._compress(_windows(streams["attributes"])).unflatten(0, (-1, windows_of(streams["attributes"].shape[1])))
        latent = latent[:, :, None].expand(-1, -1, WINDOW, -1).flatten(1, 2)
        return torch.cat([*(streams[name].float() for name in self.inputs), latent.float()], dim=-1)

    def decode(self, encoding: Tensor) -> dict[str, Tensor]:
        """The first 25 features of an encoding, (batch, frames, 25), are the attributes; there are no coefficients."""
        return {"attributes": encoding}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 MSE of the attributes of each item and what is left of them after the latents, in float32.

        Args:
            batch: `attributes` (batch, frames, 25); nothing else is read.

        Returns:
            (batch,); an empty batch has an empty loss, through which zeros flow back.
        """
        attributes = batch["attributes"]
        windows = _windows(attributes)
        error = (self._reconstruct(self._compress(windows)).float() - windows.float()).square()
        return 10 * error.unflatten(0, (len(attributes), windows_of(attributes.shape[1]))).mean((1, 2, 3))

    forward = loss

    def _compress(self, windows: Tensor) -> Tensor:
        """(windows, 50, 25) -> the state after the last frame, (windows, latent)."""
        return last_state(self.encoder, windows.to(self.out.weight.dtype))

    def _reconstruct(self, latent: Tensor) -> Tensor:
        """(windows, latent), which is the input at every frame -> (windows, 50, 25)."""
        return self.out(unrolled(self.decoder, latent, WINDOW))


class SpeakerTokens(nn.Module):
    """The condition of a window: 50 tokens of the speaker's voice, 50 of its coefficients, and one of its latent.

    In training each kind is hidden from a window with probability 0.2: its tokens are zero.

    Args:
        model: widths of tokens and latent.
        acoustic_width: of all acoustic streams together.
    """

    def __init__(self, model: config.Model, acoustic_width: int):
        super().__init__()
        self.parts, self.width = _parts(model, acoustic_width), model.width
        # The biases are what tells the kinds apart.
        self.kinds = nn.ModuleList(nn.Linear(width, model.width) for width in self.parts[1:])

    def forward(self, windows: Tensor) -> Tensor:
        """Windows of the speaker's encoding, normalised (batch, 50, width) -> tokens (batch, 101, model.width)."""
        dtype = next(self.parameters()).dtype
        # The latent says what the attributes would.
        read = windows.to(dtype).split(self.parts, dim=-1)[1:]
        coefficients, voice, latent = (kind(part) for kind, part in zip(self.kinds, read, strict=True))
        positions = _positions(windows, self.width).to(dtype)
        # Every frame of a window has the same latent.
        tokens = [voice + positions, coefficients + positions, latent[:, :1]]
        if self.training:
            shown = torch.rand(len(tokens), len(windows), 1, 1, device=windows.device) >= HIDDEN_TOKENS
            tokens = [kind * mask for kind, mask in zip(tokens, shown.to(dtype), strict=True)]
        return torch.cat(tokens, dim=1)


class WindowDenoiser(nn.Module):
    """A Transformer decoder whose targets are the 50 frames of a window and whose memory is the diffusion time and the speaker.

    Post-norm, GELU, feed-forward twice as wide. The output starts at zero.

    Args:
        model: width, heads, layers and dropout.

    Raises:
        ValueError: if the width does not divide into heads.
    """

    def __init__(self, model: config.Model):
        super().__init__()
        check_heads("model.width", model.width, model.heads)
        self.width, features = model.width, TARGETS["attributes"]
        self.embed = nn.Linear(features, model.width)
        self.time = nn.Sequential(nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, model.width))
        layer = nn.TransformerDecoderLayer(model.width, model.heads, 2 * model.width, model.dropout, "gelu", batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, model.layers)
        self.out = ZeroLinear(model.width, features)

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """Denoise each window.

        Args:
            noisy: (batch, 50, 25).
            times: (batch,), integers or fractions.
            tokens: of the speaker, (batch, any number, model.width).

        Returns:
            The prediction, (batch, 50, 25), in the precision of the weights.
        """
        dtype = self.out.weight.dtype
        frames = self.embed(noisy.to(dtype)) + _positions(noisy, self.width).to(dtype)
        time = self.time(sinusoid(times, self.width).to(dtype))
        return self.out(self.decoder(frames, torch.cat([time[:, None], tokens.to(dtype)], dim=1)))


def _parts(model: config.Model, acoustic_width: int) -> tuple[int, ...]:
    """Widths of the four parts of an encoding, in their order."""
    return TARGETS["attributes"], TARGETS["coefficients"], acoustic_width, model.latent


def _positions(frames: Tensor, width: int) -> Tensor:
    """A sinusoid for each frame of (batch, frames, any), (frames, width) float32."""
    return sinusoid(torch.arange(frames.shape[1], device=frames.device), width)


def _windows(stream: Tensor) -> Tensor:
    """(batch, frames, width) -> (batch * windows, 50, width)."""
    return stream.unflatten(1, (windows_of(stream.shape[1]), WINDOW)).flatten(0, 1)
