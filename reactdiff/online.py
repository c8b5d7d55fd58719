"""A listener that reacts while the speaker speaks, window by window, and never takes anything back."""

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

    Args:
        reactor: trained with `model.online`.
        item: (clip key, direction), which keys the noise.
        count: K.
        seed: keys the noise.

    Raises:
        ValueError: if the model needs the whole clip.
    """

    def __init__(self, reactor: Reactor, item: Item, count: int, seed: int):
        if reactor.diffusion is None or not reactor.diffusion.online:
            raise ValueError("this model needs the speaker's whole clip before it reacts; train one with model.online=true")
        self._reactor, self._diffusion = reactor, reactor.diffusion
        self._item, self._count, self._seed = item, count, seed
        self._now, self._hears = Conversation(), False

    def react(self) -> dict[str, np.ndarray]:
        """The next window of every reaction, (K, 50, ...) by name, to what was heard before it.

        Raises:
            RuntimeError: if the speaker's window that belongs to the last one was not heard yet.
        """
        self._turn(hears=False)
        drawn, self._now = self._diffusion.react(self._now, partial(self._noise, self._now.window))
        return {name: array[0] for name, array in self._reactor.decode(drawn).items()}

    def hear(self, streams: dict[str, np.ndarray]) -> None:
        """Listen to what the speaker did in the window that was just reacted in: the codec's inputs, (50, width) each.

        Raises:
            RuntimeError: if there was no reaction in that window yet.
        """
        self._turn(hears=True)
        here = {name: torch.from_numpy(stream)[None].to(self._reactor.codec.device) for name, stream in streams.items()}
        with torch.no_grad():
            # Latents are kept in half precision, and so the model has only seen such.
            latent = self._reactor.codec.encode(here).half().float()
        self._now = self._diffusion.hear(self._now, latent)

    def _turn(self, hears: bool) -> None:
        if hears != self._hears:
            raise RuntimeError("react and hear take turns: first the reactions in a window, then what the speaker did in it")
        self._hears = not hears

    def _noise(self, window: int, number: int) -> Tensor:
        features = self._diffusion.target
        drawn = [window_noise(self._seed, *self._item, k, window, features, number) for k in range(self._count)]
        return torch.from_numpy(np.stack(drawn)).reshape(1, self._count, WINDOW, features).to(self._reactor.codec.device)
