"""From a speaker's latents to listeners' reactions: draw K of them in one batch from one encoding, and decode them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reactdiff.clip import TARGETS, windows_of
from reactdiff.data.keyed import normal
from reactdiff.diffusion.noise import generation_noise
from reactdiff.model.codec import Codec
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.trans_vae import TransVAE

Item = tuple[str, int]
"""(clip key, direction)."""


@dataclass(frozen=True)
class Reactor:
    """A trained model of any family: what encodes persons, and what draws listeners; a Trans-VAE is both in one."""

    codec: Codec
    diffusion: LatentDiffusion | None

    @property
    def hears(self) -> tuple[str, ...]:
        """What is read of a speaker; where attributes are denoised themselves, the codec's other inputs are the listener's."""
        direct = self.diffusion is not None and self.diffusion.direct
        return tuple(name for name in self.codec.inputs if not (direct and name in TARGETS))

    def react(
        self, speakers: np.ndarray, items: list[Item], count: int, seed: int, listeners: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Several reactions to each speaker; which ones depends on (seed, clip, direction, k) alone.

        Args:
            speakers: raw latents (items, frames, width).
            items: of each.
            count: K, reactions to each.
            seed: keys the noise.
            listeners: raw latents of the real listeners, of the same shape, as `LatentDiffusion.sample` has it.

        Returns:
            `attributes` (items, K, frames, 25) and, but from PerFRDiff and BeLFusion, `coefficients` (items, K, frames, 58), float32.
        """
        latents = torch.from_numpy(speakers).float().to(self.codec.device)
        real = None if listeners is None else torch.from_numpy(listeners).float().to(self.codec.device)
        if self.diffusion is None:
            assert isinstance(self.codec, TransVAE)
            reactions = self.codec.react(latents, self._posterior(items, count, seed))
            return {name: reaction.float().cpu().numpy() for name, reaction in reactions.items()}
        return self.decode(self.diffusion.sample(latents, self._noise(items, count, seed, windows_of(speakers.shape[1])), real))

    @torch.no_grad()
    def decode(self, drawn: Tensor) -> dict[str, np.ndarray]:
        """Raw latents of listeners (items, K, frames, features) to what they show, one array (items, K, frames, ...) each."""
        decoded = [self.codec.decode(reactions) for reactions in drawn]  # one item at a time: attention memory grows with the batch
        return {name: torch.stack([one[name] for one in decoded]).float().cpu().numpy() for name in decoded[0]}

    def _noise(self, items: list[Item], count: int, seed: int, windows: int) -> Callable[[int], Tensor]:
        assert self.diffusion is not None
        features = self.diffusion.target

        # Online, a sampler that adds noise on its way comes back to each draw in every window.
        @lru_cache(maxsize=self.diffusion.sampling_steps if self.diffusion.online else 1)
        def noise(number: int) -> Tensor:
            drawn = [[generation_noise(seed, *item, k, windows, features, number) for k in range(count)] for item in items]
            return torch.from_numpy(np.array(drawn)).to(self.codec.device)

        return noise

    def _posterior(self, items: list[Item], count: int, seed: int) -> Tensor:
        drawn = [[normal((self.codec.width // 2,), seed, "generation posterior", *item, k) for k in range(count)] for item in items]
        return torch.from_numpy(np.array(drawn)).to(self.codec.device)
