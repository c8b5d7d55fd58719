"""Weights and inputs that a rule makes from their names, so that equal weights can be had without shipping them.

The parity fixtures hold what the authors' own modules put out for them.
"""

import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reactdiff import config
from reactdiff.data.sample import StreamSpec
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.published import Sources

DATA = Path(__file__).parents[2] / "data"


def fixtures() -> list[Path]:
    """The parity fixtures of the repository, and those of the folder $REACTDIFF_PARITY."""
    folders = [DATA] + [Path(folder) for folder in [os.environ.get("REACTDIFF_PARITY")] if folder]
    return [path for folder in folders for path in sorted(folder.glob("*.npz" if folder != DATA else "parity_*.npz"))]


class Case:
    """One fixture: the widths it was made with, and what the authors' modules put out."""

    def __init__(self, path: Path):
        self.widths = json.loads(path.with_suffix(".json").read_text())
        self.expected = np.load(path, allow_pickle=False)
        self.seed, self.frames, self.latent = (self.widths[name] for name in ("seed", "frames", "latent"))
        names = ("hidden", "latent", "channels")
        self.model = config.Model(**{name: self.widths[name] for name in names}, condition=self.widths["cond"])
        self.streams = authors_streams(au=self.widths["au"], w2v=self.widths["w2v"])

    def autoencoder(self) -> Autoencoder:
        with torch.device("meta"):
            return Autoencoder(self.model, self.streams).to_empty(device="cpu").eval()

    def latent_diffusion(self, **diffusion: str) -> LatentDiffusion:
        """With latents that lie in [-1, 1] already, so that raw and normalised are the same."""
        with torch.device("meta"):
            module = LatentDiffusion(self.model, config.Diffusion(**diffusion), self.frames).to_empty(device="cpu").eval()
        module.set_range(-torch.ones(self.frames, self.latent), torch.ones(self.frames, self.latent))
        return module

    def input(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(_rng(self.seed, f"input {name}").standard_normal(shape, dtype=np.float32))

    def fill(self, module: nn.Module, sources: Sources, prefix: str) -> None:
        """Fills every parameter with the weights that the rule makes for the authors' names."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                for part, source in zip(parameter.chunk(len(sources[name])), sources[name], strict=True):
                    _fill(part.numpy(), self.seed, f"{prefix} {source}")


def authors_streams(au: int = 25088, w2v: int = 1536) -> list[StreamSpec]:
    facial, acoustic = {"va": 64, "au": au, "fer": 1408}, {"mfcc": 26, "w2v": w2v}
    return [StreamSpec(name, "facial", width) for name, width in facial.items()] + [
        StreamSpec(name, "acoustic", width) for name, width in acoustic.items()
    ]


def _fill(out: np.ndarray, seed: int, name: str) -> None:
    _rng(seed, name).standard_normal(dtype=np.float32, out=out)
    if out.ndim > 1:
        out /= np.float32(math.sqrt(math.prod(out.shape[1:])))
    else:
        out *= np.float32(0.1)
        out += name.endswith("weight")


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
