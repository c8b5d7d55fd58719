"""The second denoiser: a transformer over all frames of a clip, continuous across windows or chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reactdiff import config
from reactdiff.clip import WINDOW
from reactdiff.model.layers import ZeroLinear, check_heads
from reactdiff.model.unet import sinusoid

ROTATION_BASE = 10000.0
FAR = 2**16
"""Places beyond which angles are formed in float64: a float32 product of a place and a frequency is off by more than 0.004 there."""


@dataclass(frozen=True)
class Past:
    """What finished chunks left for the next one.

    Attributes:
        chunks: how many there were, forgotten ones included.
        seen: keys and values of each layer, (batch, heads, tokens of both persons chunk by chunk, width / heads) each, of the last
            `model.context` windows; empty at the beginning.
        heard: the last embedded tokens of the speaker that a lag can still reach, (batch, tokens, width); None where there are no lags.
        shown: the listener's last frame, (batch, features); None at the beginning.
    """

    chunks: int = 0
    seen: tuple[tuple[Tensor, Tensor], ...] = ()
    heard: Tensor | None = None
    shown: Tensor | None = None


class FrameTransformer(nn.Module):
    """Tokens of the listener attend to tokens of both persons, in their own chunk and those of the `model.context` nearest windows.

    A token is `model.patch` frames. Positions are rotations (Su et al., 2021), so only distances count and a clip may have any length.
    Each chunk has a diffusion time of its own, which scales and shifts its tokens before every layer (Peebles and Xie, 2023, without
    gates). Offline, chunks are windows, and see each other. Online, they have `model.chunk` frames, and none sees a later one: earlier
    ones may be clean while the next is still noise. What the listener may know of the speaker comes a chunk late, and stands

    - without `model.lags` where the chunk is that reacts to it: it is added to its tokens, and attended to as if it were of now;
    - with them at its true time: attention sees when it was, and to each token is added what was heard so many frames before it.

    Args:
        model: width, layers, heads, context, and how it is online.
        features: of a frame that is denoised.

    Raises:
        ValueError: if the width does not divide into heads of an even width.
    """

    def __init__(self, model: config.Model, features: int):
        super().__init__()
        check_heads("model.width", model.width, model.heads, even=True)
        frames = model.chunk_frames
        self.online, self.patch, self.head_width = model.online, model.patch, model.width // model.heads
        self.tokens, self.reach = frames // model.patch, model.context * WINDOW // frames
        self.lags = tuple(lag // model.patch for lag in model.lags)
        self._back: dict[torch.device, Tensor] = {}
        self.embed = nn.Linear(model.patch * features, model.width)
        self.time = nn.Sequential(nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, model.width), nn.SiLU())
        self.layers = nn.ModuleList(Layer(model.width, model.heads) for _ in range(model.layers))
        self.norm = TimedNorm(model.width)
        self.out = ZeroLinear(model.width, model.patch * features)
        if self.lags:
            self.lagged = nn.Linear(len(self.lags) * model.width, model.width)

    def forward(
        self, noisy: Tensor, times: Tensor, speaker: Tensor, past: Past | None = None, history: Tensor | None = None
    ) -> Tensor:
        """Denoise the chunks of a clip, or the one chunk after those in `past`.

        Args:
            noisy: (batch, chunks, frames, features).
            times: (batch, chunks).
            speaker: (batch, chunks, tokens, width), embedded; chunk by chunk what the listener has heard last.
            past: of the chunks before; then there is one chunk here.
            history: finished chunks of the shape of `noisy`. With them, each noisy one sees the finished ones before it, as in sampling,
                instead of noisy ones.

        Returns:
            The prediction, (batch, chunks, frames, features).
        """
        return self._run(noisy, times, speaker, past or Past(), history)[0]

    def remember(self, clean: Tensor, speaker: Tensor, past: Past) -> Past:
        """The past after one more finished chunk, (batch, 1, frames, features): its keys and values at time 0."""
        times = torch.zeros(clean.shape[:2], dtype=torch.long, device=clean.device)
        _, new = self._run(clean, times, speaker, past, None)
        old = past.seen or [(key[:, :, :0], value[:, :, :0]) for key, value in new]
        kept = 2 * self.tokens * self.reach
        seen = (tuple(torch.cat(pair, dim=2)[:, :, -kept:] for pair in zip(*layer, strict=True)) for layer in zip(old, new, strict=True))
        heard = self._heard(speaker.flatten(1, 2), past)[:, -self._behind :] if self._behind else None
        return Past(past.chunks + 1, tuple(seen), heard, clean[:, -1, -1])  # type: ignore[arg-type]

    def _run(
        self, noisy: Tensor, times: Tensor, speaker: Tensor, past: Past, history: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        chunks, first = noisy.shape[1], past.chunks * self.tokens
        turn = rotation(first, chunks * self.tokens, self.head_width, noisy)
        late = rotation(first - self.tokens, chunks * self.tokens, self.head_width, noisy) if self.lags and self.online else turn
        x, time = noisy, self._time(times, noisy)
        if history is not None:
            x, turn = torch.cat((history, noisy), dim=1), turn.repeat(1, 2, 1)
            time = torch.cat((self._time(torch.zeros_like(times), noisy), time), dim=1)
        added = self._added(speaker, past)
        x = self.embed(self.fold(x)) + (added if history is None else added.repeat(1, 2, 1, 1))
        mask, new = self._mask(chunks, noisy.device, history is not None), []
        for number, layer in enumerate(self.layers):
            x, keys_values = layer(x, time, speaker, turn, late, mask, past.seen[number] if past.seen else None)
            new.append(keys_values)
        return self.out(self.norm(x, time))[:, -chunks:].reshape(noisy.shape), new

    def _time(self, times: Tensor, like: Tensor) -> Tensor:
        """Diffusion times (batch, chunks) to what norms take, (batch, chunks, 1, width)."""
        return self.time(sinusoid(times.flatten(), self.embed.out_features).to(like.dtype)).unflatten(0, times.shape)[:, :, None]

    def fold(self, frames: Tensor) -> Tensor:
        """(batch, chunks, frames, features) to tokens, (batch, chunks, tokens, patch * features)."""
        return frames if self.patch == 1 else frames.unflatten(2, (self.tokens, self.patch)).flatten(3)

    def _added(self, speaker: Tensor, past: Past) -> Tensor:
        """What of the speaker is added to each token, (batch, chunks, tokens, width)."""
        # What the speaker does at a frame is both added to it and attended to: most of a reaction is near its cause.
        if not self.lags:
            return speaker
        heard = self._heard(speaker.flatten(1, 2), past)
        rows, first = speaker.shape[1] * self.tokens, past.chunks * self.tokens
        token = torch.arange(first, first + rows, device=speaker.device)
        if speaker.device not in self._back:  # a copy in each forward pass would be waited for each time
            self._back[speaker.device] = torch.tensor(self.lags, device=speaker.device)[:, None]
        source = token - self._back[speaker.device]  # (lags, tokens), as time goes
        begin, ahead = (token // self.tokens * self.tokens, self.tokens) if self.online else (token + 1, 0)
        known = (source >= 0) & (source < begin)
        place = (source - first + ahead + heard.shape[1] - rows).clamp(0, heard.shape[1] - 1)  # the speaker comes `ahead` tokens late
        lagged = (heard[:, place] * known[..., None]).movedim(1, 2).flatten(2)
        added = self.lagged(lagged).view_as(speaker)
        return added if self.online else speaker + added

    def _heard(self, speaker: Tensor, past: Past) -> Tensor:
        """The embedded speaker, (batch, tokens, width), with what lags can reach before it."""
        return speaker if past.heard is None else torch.cat((past.heard, speaker), dim=1)

    @property
    def _behind(self) -> int:
        """Tokens before the chunk's own that a lag can reach."""
        return max(0, max(self.lags) - self.tokens) if self.lags and self.online else 0

    def _mask(self, chunks: int, device: torch.device, history: bool) -> Tensor | None:
        """Which tokens see which, (tokens, tokens of speaker and listener); None: all of them."""
        if not history and (chunks == 1 or (not self.online and chunks <= self.reach + 1)):
            return None
        chunk = torch.arange(chunks, device=device).repeat_interleave(self.tokens)
        ahead = chunk[None, :] - chunk[:, None]
        sees = (ahead >= -self.reach) & (ahead <= (0 if self.online else self.reach))
        if not history:
            return sees.repeat(1, 2)
        none, now = torch.zeros_like(sees), ahead == 0
        return torch.cat((torch.cat((sees, sees, none), dim=1), torch.cat((sees, sees & ~now, now), dim=1)))


class Layer(nn.Module):
    """Attention to both persons, then a feed-forward of four times the width; both residual, both before a norm that knows the time."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = TimedNorm(width), TimedNorm(width)
        self.attention = DyadAttention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        speaker: Tensor,
        turn: Tensor,
        late: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(batch, chunks, tokens, width) -> the same, and the keys and values of these tokens."""
        attended, keys_values = self.attention(self.norm1(x, time), speaker, turn, late, mask, past)
        x = x + attended
        return x + self.feed(self.norm2(x, time)), keys_values


class DyadAttention(nn.Module):
    """The listener's tokens ask; the speaker's and the listener's own answer together, told apart by their projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.listener = nn.Linear(width, 3 * width)
        self.speaker = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, speaker: Tensor, turn: Tensor, late: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From x and speaker (batch, chunks, tokens, width), turned by `turn` and `late`, to the shape of x, and keys and values."""
        ask, own_key, own_value = (self._split(part) for part in self.listener(x).chunk(3, dim=-1))
        key, value = (self._split(part) for part in self.speaker(speaker).chunk(2, dim=-1))
        keys = torch.cat((rotate(key, late), rotate(own_key, turn)), dim=2)
        values = torch.cat((value, own_value), dim=2)
        new = keys, values
        if past is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
        answer = F.scaled_dot_product_attention(rotate(ask, turn), keys, values, attn_mask=mask)
        return self.out(answer.transpose(1, 2).flatten(2)).view_as(x), new

    def _split(self, x: Tensor) -> Tensor:
        """(batch, chunks, tokens, width) -> (batch, heads, all tokens, width / heads)."""
        return x.flatten(1, 2).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


class TimedNorm(nn.Module):
    """LayerNorm whose scale and shift are functions of the diffusion time; both start as those of a plain one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = ZeroLinear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """From x (batch, chunks, tokens, width) and the embedded time (batch, chunks, 1, width), to the shape of x."""
        scale, shift = self.modulate(time).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


def rotation(first: int, frames: int, width: int, like: Tensor) -> Tensor:
    """Cosines and sines of places first .. first + frames - 1, (2, frames, width / 2): angle t f_i with f_i = 10000^(-2i / width)."""
    precision = torch.float32 if first + frames <= FAR else torch.float64
    positions = torch.arange(first, first + frames, device=like.device, dtype=precision)
    frequencies = ROTATION_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles = positions[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(like.dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the two halves of x (..., frames, width) against each other by the angles of `rotation`."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
