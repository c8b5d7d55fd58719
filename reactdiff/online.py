"""A listener that reacts while the speaker speaks, chunk by chunk, and never takes anything back."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from reactdiff.clip import WINDOW
from reactdiff.diffusion.noise import window_noise
from reactdiff.generate import Item, Reactor
from reactdiff.model.latent_diffusion import Conversation


class Listener:
    """K listeners to one speaker, online. Their reactions are those `Reactor.react` draws for the whole clip, up to rounding.

    A reaction frame depends on what the speaker did up to the last whole chunk before it. So once so many frames were heard, all
    reactions up to the end of the chunk after them are known; those of the first chunk are before anything was heard.

    Args:
        reactor: trained with `model.online`.
        item: (clip key, direction), which keys the noise.
        count: K.
        seed: keys the noise.

    Attributes:
        chunk: frames that are heard, and reacted in, at once.
        hears: names of the speaker's streams.

    Raises:
        ValueError: if the model needs the whole clip.
    """

    def __init__(self, reactor: Reactor, item: Item, count: int, seed: int):
        if reactor.diffusion is None or not reactor.diffusion.online:
            raise ValueError("this model needs the speaker's whole clip before it reacts; train one with model.online=true")
        self._reactor, self._diffusion = reactor, reactor.diffusion
        self._item, self._count, self._seed = item, count, seed
        self.chunk = self._diffusion.chunk
        self.hears = reactor.hears
        self._now = Conversation()
        self._streams: dict[str, np.ndarray] = {}
        self._waiting = 0
        self._drawn: Tensor | None = None

    def react(self) -> dict[str, np.ndarray]:
        """The reactions that became known since the last call, (K, frames, ...) by name; no frames where too little was heard since."""
        made: list[dict[str, np.ndarray]] = []
        while self._now.chunk == 0 or self._waiting >= self.chunk:
            if self._now.chunk:
                self._listen()
            drawn, self._now = self._diffusion.react(self._now, partial(self._noise, self._now.chunk))
            made.append(self._decode(drawn))
        if not made:
            shown = self._decoded(torch.zeros(1, self._count, self.chunk, self._diffusion.target, device=self._reactor.codec.device))
            return {name: array[:, :0] for name, array in shown.items()}
        return {name: np.concatenate([chunk[name] for chunk in made], axis=1) for name in made[0]}

    def hear(self, streams: dict[str, np.ndarray]) -> None:
        """Listen to what the speaker did next: the streams of `hears`, (frames, width) each, any number of frames.

        Raises:
            ValueError: if a stream is lacking, is not of the width that was trained on, or has a value that is not finite in float16, or
                if they differ in length. Nothing of them was heard then. A stream of `diffusion.hidden_streams` may have any values.
        """
        if lacking := [name for name in self.hears if name not in streams]:
            raise ValueError(f"the listener hears {', '.join(self.hears)}; {', '.join(lacking)} is lacking")
        for name in self.hears:
            self._check(name, streams[name])
        lengths = {name: len(streams[name]) for name in self.hears}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all streams of the speaker must go on by equally many frames, but these go on by {lengths}")
        for name in self.hears:
            before = self._streams.get(name)
            self._streams[name] = np.concatenate([streams[name]] if before is None else [before, streams[name]])  # the caller's may change
        self._waiting += lengths[self.hears[0]]

    def _check(self, name: str, stream: np.ndarray) -> None:
        """A stream can be heard: what is remembered of one bad frame would be in all that follows."""
        width = self._reactor.codec.widths[name]
        if stream.ndim != 2 or stream.shape[1] != width:
            raise ValueError(f"{name} is of shape {stream.shape}, but the listener was trained on (frames, {width})")
        if name in self._diffusion.hidden:
            return
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(stream.astype(np.float16)))
        if len(bad):
            frame, feature = bad[0].tolist()
            raise ValueError(
                f"{name} has {stream[frame, feature]} in frame {frame}, feature {feature} of what was to be heard, which float16 cannot "
                "hold as a finite number: give the listener the frame before again, for example"
            )

    def _listen(self) -> None:
        """Take in the next chunk of what was heard."""
        codec = self._reactor.codec
        have = len(self._streams[self.hears[0]])
        end = have - self._waiting + self.chunk
        begin = max(0, end - self.chunk - codec.encoder_reach)
        here = {name: torch.from_numpy(stream[begin:end])[None].to(codec.device) for name, stream in self._streams.items()}
        with torch.no_grad():
            # Latents are kept in half precision, and so the model has only seen such.
            latent = codec.listen(here)[:, -self.chunk :].half().float()
        self._now = self._diffusion.hear(self._now, latent)
        self._waiting -= self.chunk
        forget = max(0, end - codec.encoder_reach)
        self._streams = {name: stream[forget:] for name, stream in self._streams.items()}

    def _decode(self, drawn: Tensor) -> dict[str, np.ndarray]:
        """What the listeners show in the chunk (1, K, frames, features) that was drawn last."""
        reach = self._reactor.codec.decoder_reach
        seen = drawn if self._drawn is None else torch.cat((self._drawn, drawn), dim=2)
        self._drawn = seen[:, :, -reach:] if reach else None
        return {name: array[:, -self.chunk :] for name, array in self._decoded(seen).items()}

    def _decoded(self, drawn: Tensor) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self._reactor.decode(drawn).items()}

    def _noise(self, chunk: int, number: int) -> Tensor:
        features, first = self._diffusion.target, chunk * self.chunk
        window, within = divmod(first, WINDOW)
        drawn = [window_noise(self._seed, *self._item, k, window, features, number) for k in range(self._count)]
        these = np.stack(drawn)[None, :, within : within + self.chunk]
        return torch.from_numpy(these).to(self._reactor.codec.device)
