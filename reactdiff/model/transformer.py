"""The second denoiser: a transformer over all frames of a clip, continuous across windows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reactdiff import config
from reactdiff.clip import WINDOW
from reactdiff.model.layers import ZeroLinear, check_heads
from reactdiff.model.unet import sinusoid

ROTATION_BASE = 10000.0


@dataclass(frozen=True)
class Past:
    """What finished windows left for the next one to attend to.

    Attributes:
        windows: how many there were, forgotten ones included.
        seen: keys and values of each layer, (batch, heads, 100 frames of both persons a window, width / heads) each, of the
            last `model.context` windows; empty at the beginning.
    """

    windows: int = 0
    seen: tuple[tuple[Tensor, Tensor], ...] = ()


class FrameTransformer(nn.Module):
    """Every frame of the listener attends to frames of both persons, in its own window and the `model.context` nearest ones.

    Positions are rotations (Su et al., 2021), so only distances count and a clip may have any length. Each window has a
    diffusion time of its own, which scales and shifts its frames before every layer (Peebles and Xie, 2023, without gates).
    Online, a frame sees no window after its own: earlier windows may be clean while the next one is still noise.

    Args:
        model: width, layers, heads, context, and whether it is online.
        features: of a frame that is denoised.

    Raises:
        ValueError: if the width does not divide into heads of an even width.
    """

    def __init__(self, model: config.Model, features: int):
        super().__init__()
        check_heads("model.width", model.width, model.heads, even=True)
        self.context, self.online, self.head_width = model.context, model.online, model.width // model.heads
        self.embed = nn.Linear(features, model.width)
        self.time = nn.Sequential(nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, model.width), nn.SiLU())
        self.layers = nn.ModuleList(Layer(model.width, model.heads) for _ in range(model.layers))
        self.norm = TimedNorm(model.width)
        self.out = ZeroLinear(model.width, features)

    def forward(self, noisy: Tensor, times: Tensor, speaker: Tensor, past: Past | None = None) -> Tensor:
        """Denoise the windows of a clip, or the one window after those in `past`.

        Args:
            noisy: (batch, windows, 50, features).
            times: (batch, windows).
            speaker: (batch, windows, 50, width), embedded; window by window what the listener may react to.
            past: of the windows before; then there is one window here.

        Returns:
            The prediction, (batch, windows, 50, features).
        """
        return self._run(noisy, times, speaker, past or Past())[0]

    def remember(self, clean: Tensor, speaker: Tensor, past: Past) -> Past:
        """The past after one more finished window, (batch, 1, 50, features): its keys and values at time 0."""
        times = torch.zeros(clean.shape[:2], dtype=torch.long, device=clean.device)
        _, new = self._run(clean, times, speaker, past)
        kept = 2 * WINDOW * self.context
        old = past.seen or [(key[:, :, :0], value[:, :, :0]) for key, value in new]
        seen = (tuple(torch.cat(pair, dim=2)[:, :, -kept:] for pair in zip(*layer, strict=True)) for layer in zip(old, new, strict=True))
        return Past(past.windows + 1, tuple(seen))  # type: ignore[arg-type]

    def _run(self, noisy: Tensor, times: Tensor, speaker: Tensor, past: Past) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        windows = noisy.shape[1]
        turn = rotation(past.windows * WINDOW, windows * WINDOW, self.head_width, noisy)
        time = self.time(sinusoid(times.flatten(), self.embed.out_features).to(noisy.dtype)).unflatten(0, times.shape)[:, :, None]
        # What the speaker does at a frame is both added to it and attended to: most of a reaction is near its cause.
        x = self.embed(noisy) + speaker
        mask, new = self._mask(windows, noisy.device), []
        for number, layer in enumerate(self.layers):
            x, keys_values = layer(x, time, speaker, turn, mask, past.seen[number] if past.seen else None)
            new.append(keys_values)
        return self.out(self.norm(x, time)), new

    def _mask(self, windows: int, device: torch.device) -> Tensor | None:
        """Which frames see which, (frames, 2 frames of speaker and listener); None: all of them."""
        if windows == 1 or (not self.online and windows <= self.context + 1):
            return None
        window = torch.arange(windows, device=device).repeat_interleave(WINDOW)
        ahead = window[None, :] - window[:, None]
        sees = (ahead >= -self.context) & (ahead <= (0 if self.online else self.context))
        return sees.repeat(1, 2)


class Layer(nn.Module):
    """Attention to both persons, then a feed-forward of four times the width; both residual, both before a norm that knows the time."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = TimedNorm(width), TimedNorm(width)
        self.attention = DyadAttention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Tensor, time: Tensor, speaker: Tensor, turn: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(batch, windows, 50, width) -> the same, and the keys and values of these frames."""
        attended, keys_values = self.attention(self.norm1(x, time), speaker, turn, mask, past)
        x = x + attended
        return x + self.feed(self.norm2(x, time)), keys_values


class DyadAttention(nn.Module):
    """The listener's frames ask; the speaker's and the listener's own answer together, told apart by their projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.listener = nn.Linear(width, 3 * width)
        self.speaker = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, speaker: Tensor, turn: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From x and speaker, both (batch, windows, 50, width), to the same shape, and the keys and values of these frames."""
        ask, own_key, own_value = (self._split(part) for part in self.listener(x).chunk(3, dim=-1))
        key, value = (self._split(part) for part in self.speaker(speaker).chunk(2, dim=-1))
        keys = torch.cat((rotate(key, turn), rotate(own_key, turn)), dim=2)
        values = torch.cat((value, own_value), dim=2)
        new = keys, values
        if past is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        answer = F.scaled_dot_product_attention(rotate(ask, turn), keys, values, attn_mask=mask)
        return self.out(answer.transpose(1, 2).flatten(2)).view_as(x), new

    def _split(self, x: Tensor) -> Tensor:
        """(batch, windows, 50, width) -> (batch, heads, frames, width / heads)."""
        return x.flatten(1, 2).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


class TimedNorm(nn.Module):
    """LayerNorm whose scale and shift are functions of the diffusion time; both start as those of a plain one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = ZeroLinear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """From x (batch, windows, 50, width) and the embedded time (batch, windows, 1, width), to the shape of x."""
        scale, shift = self.modulate(time).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


def rotation(first: int, frames: int, width: int, like: Tensor) -> Tensor:
    """Cosines and sines of frames first .. first + frames - 1, (2, frames, width / 2): angle t f_i with f_i = 10000^(-2i / width)."""
    positions = torch.arange(first, first + frames, device=like.device, dtype=torch.float32)
    frequencies = ROTATION_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(like.dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the two halves of x (..., frames, width) against each other by the angles of `rotation`."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
