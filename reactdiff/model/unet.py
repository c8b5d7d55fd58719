"""The denoiser: a 1-D UNet over a window, whose frames are the channels and whose features are the length."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reactdiff.model.layers import ZeroConv1d, ZeroLinear

GROUPS = 32


class UNet(nn.Module):
    """The UNet of Dhariwal and Nichol (2021), in one dimension.

    Attention stands at every level but the deepest, and in the middle. The output starts at zero.

    Args:
        frames: channels of the window that goes in and comes out.
        length: features of a frame.
        channels: channels of the first level, a multiple of 32; the sinusoid of time is as wide.
        multipliers: channels of each level, as multiples of `channels`.
        condition: width of the condition.
        blocks: residual blocks of each level on the way down.

    Raises:
        ValueError: if the length cannot be halved between all levels.
    """

    def __init__(self, frames: int, length: int, channels: int, multipliers: tuple[int, ...], condition: int, blocks: int):
        super().__init__()
        deepest = len(multipliers) - 1
        if length % 2**deepest:
            raise ValueError(
                f"model.latent is {length}, but the {len(multipliers)} levels of model.multipliers halve it {deepest} times; "
                f"make it a multiple of {2**deepest}, or use fewer levels"
            )
        self.channels, embedding = channels, 4 * channels + condition
        self.time = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.stem = nn.Conv1d(frames, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(Block(width, channels * multiplier, embedding, level < deepest))
                width = channels * multiplier
                skips.append(width)
            if level < deepest:
                self.down.append(Halve(width))
                skips.append(width)
        self.middle = nn.ModuleList(Block(width, width, embedding, attends) for attends in (True, False))
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                doubles = level > 0 and number == blocks
                self.up.append(Block(width + skips.pop(), channels * multiplier, embedding, level < deepest, doubles))
                width = channels * multiplier
        self.norm = nn.GroupNorm(GROUPS, width)
        self.out = ZeroConv1d(width, frames, 3, padding=1)

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """(batch, frames, length), times (batch,), condition (batch, condition) -> prediction (batch, frames, length)."""
        time = self.time(sinusoid(times, self.channels).to(noisy.dtype))
        embedding = F.silu(torch.cat([time, condition], dim=1))
        x = self.stem(noisy)
        skips = [x]
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(F.silu(self.norm(x)))


def sinusoid(times: Tensor, width: int) -> Tensor:
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-2i / width), i = 0 .. width / 2 - 1: (batch,) -> (batch, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=times.device))
    angles = times[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """A residual block, then self-attention where it attends, then the double length where it doubles."""

    def __init__(self, inputs: int, outputs: int, embedding: int, attends: bool, doubles: bool = False):
        super().__init__()
        self.residual = Residual(inputs, outputs, embedding)
        self.attention = SelfAttention(outputs) if attends else None
        self.resize = Double(outputs, outputs, 3, padding=1) if doubles else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(batch, inputs, length), (batch, embedding) -> (batch, outputs, length or 2 length)."""
        x = self.residual(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.resize is None else self.resize(x)


class Residual(nn.Module):
    """skip(x) + Conv3(SiLU(GN(Conv3(SiLU(GN(x))) + Linear(embedding)))), where the embedding went through SiLU before."""

    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = ZeroConv1d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(batch, inputs, length), (batch, embedding) -> (batch, outputs, length)."""
        hidden = self.conv1(F.silu(self.norm1(x))) + self.embed(embedding)[:, :, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class SelfAttention(nn.Module):
    """x + out(attention(GN(x))) over the length: one head, no mask, no position."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = ZeroLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, length) -> (batch, channels, length)."""
        # Features last, as fused attention wants them; a linear layer there is a 1x1 convolution.
        q, k, v = self.qkv(self.norm(x).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0]).transpose(1, 2)


class Halve(nn.Module):
    """A convolution of stride 2, a block of the way down of its own; the embedding does not touch it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(batch, channels, length), (batch, embedding) -> (batch, channels, length / 2)."""
        return self.conv(x)


class Double(nn.Conv1d):
    """Every feature twice, then the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, length) -> (batch, channels, 2 length)."""
        # Expanded rather than interpolated: the gradient is then a plain sum, deterministic on every device.
        return super().forward(x[..., None].expand(*x.shape, 2).flatten(2))
