"""From a speaker's latents to listeners' reactions: draw K latents in one batch from one encoding, and decode them."""

import numpy as np
import torch

from reactdiff.clip import windows_of
from reactdiff.diffusion.noise import generation_noise
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.latent_diffusion import LatentDiffusion


@torch.no_grad()
def react(
    autoencoder: Autoencoder, diffusion: LatentDiffusion, speakers: np.ndarray, items: list[tuple[str, int]], count: int, seed: int
) -> dict[str, np.ndarray]:
    """Several reactions to each speaker; which ones depends on (seed, clip, direction, k) alone.

    Args:
        autoencoder: decodes.
        diffusion: draws.
        speakers: raw latents (items, frames, latent).
        items: (clip key, direction) of each.
        count: K, reactions to each.
        seed: keys the noise.

    Returns:
        `attributes` (items, K, frames, 25) and `coefficients` (items, K, frames, 58), float32.
    """
    device = next(diffusion.parameters()).device
    windows, latent = windows_of(speakers.shape[1]), speakers.shape[2]
    noise = np.stack([[generation_noise(seed, key, direction, k, windows, latent) for k in range(count)] for key, direction in items])
    drawn = diffusion.sample(torch.from_numpy(speakers).float().to(device), torch.from_numpy(noise).to(device))
    decoded = [autoencoder.decode(reactions) for reactions in drawn]  # one item at a time: attention memory grows with the batch
    return {name: torch.stack([one[name] for one in decoded]).float().cpu().numpy() for name in ("attributes", "coefficients")}
