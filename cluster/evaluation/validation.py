"""How a model would score while it is still trained: a few clips of `val`, by all ranks together, at each checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.evaluation.ground_truth import GroundTruth
from cluster.runs.export import load_codec
from cluster.runs.latents import LatentDataset, encode_clip
from cluster.storage import Store
from reactdiff.clip import speaker_listener
from reactdiff.generate import Reactor
from reactdiff.metrics.official import merge
from reactdiff.metrics.partial import PartialScores
from reactdiff.model.codec import Codec
from reactdiff.model.latent_diffusion import LatentDiffusion

SPLIT = "val"
METRICS = ("FRCorr", "FRDist")
"""What is told of a validation; all official metrics would be, too, at no more cost, but two say whether training goes well."""


@dataclass(frozen=True)
class ValidationClips:
    """What is scored: a dataset's state, and the finished autoencoder where that is another stage's."""

    dataset: Store
    manifest: str
    latents: LatentDataset | None


class Validator:
    """Scores averaged weights of checkpoints. It draws keyed noise and keeps its own copy of the model, so training does not notice.

    Args:
        experiment: its configuration.
        clips: what is scored.
        module: that copy; who asks for scores gives it weights and buffers before.
        gather: collects one object of every rank on all of them.
        rank: this rank.
        ranks: of how many.
        device: where it draws.
    """

    def __init__(
        self,
        experiment: Experiment,
        clips: ValidationClips,
        module: nn.Module,
        gather: Callable[[Any], list[Any]],
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        self._experiment, self._gather, self._rank, self._ranks = experiment, gather, rank, ranks
        manifest = load_manifest(clips.dataset, clips.manifest)
        self._truth = GroundTruth(clips.dataset, manifest, SPLIT, min(experiment.evaluation.watch, int(manifest.counts(SPLIT).sum())))
        module.eval().to(device)
        if clips.latents is None:
            assert isinstance(module, Codec)
            self._reactor = Reactor(module, None)
        else:
            assert isinstance(module, LatentDiffusion)
            self._reactor = Reactor(load_codec(clips.latents.run, clips.latents.export).to(device), module)

    def validate(self) -> dict[str, float]:
        """Score the weights that the module has: metric -> value, the same on every rank; every rank calls this."""
        mine = [self._score(item) for item in range(self._rank, 2 * self._truth.clips, self._ranks)]
        parts = [PartialScores.from_arrays(arrays) for of_rank in self._gather(mine) for arrays in of_rank]
        scores = merge(parts).official
        return {name: scores[name] for name in METRICS}

    def _score(self, item: int) -> dict[str, np.ndarray]:
        clip, direction = self._truth.clip_and_direction(item)
        speaker = encode_clip(self._reactor.codec, self._truth.reader, clip)[speaker_listener(direction)[0]]
        asked = self._experiment.evaluation.predictions, self._experiment.seed
        drawn = self._reactor.react(speaker[None], [self._truth.key(item)], *asked)
        return self._truth.score([item], drawn["attributes"]).to_arrays()
