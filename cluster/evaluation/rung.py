"""How far a denoiser is, on one scale for all of them: the error of the x_0 that it predicts, decoded to attributes, at fixed log-SNR.

Schedules, predictions, samplers and autoencoders differ in what their losses mean. What they make of the same noise on the same clips, as
attributes, does not. Noise is keyed by clip, direction and window alone, so it is the same for every run whose latents are as wide, and
runs are compared item by item.
"""

import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch

from cluster.data.manifest import load_manifest
from cluster.evaluation.ground_truth import GroundTruth
from cluster.evaluation.validation import SPLIT, ValidationClips
from cluster.runs.export import load_codec
from cluster.runs.latents import encode_clip
from cluster.storage import AlreadyExists, NotFound, Store
from reactdiff.clip import WINDOW, speaker_listener, windows_of
from reactdiff.data.keyed import normal
from reactdiff.generate import Reactor
from reactdiff.model.latent_diffusion import LatentDiffusion

LEVELS = (-3.0, 0.0, 3.0)
"""Log-SNR at which the error is measured: hardly anything of the listener is left, half of it, most of it."""


class RungMeter:
    """Measures averaged weights of checkpoints; as `Validator`, it leaves no trace in training.

    Args:
        clips: what is measured on, with the latents' autoencoder.
        count: clips of `val`, the first ones.
        module: a copy of what is trained; who asks gives it weights and buffers before.
        gather: collects one object of every rank on all of them.
        rank: this rank.
        ranks: of how many.
        device: where it computes.
    """

    def __init__(
        self,
        clips: ValidationClips,
        count: int,
        module: LatentDiffusion,
        gather: Callable[[Any], list[Any]],
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        assert clips.latents is not None
        self._gather, self._rank, self._ranks = gather, rank, ranks
        manifest = load_manifest(clips.dataset, clips.manifest)
        self._truth = GroundTruth(clips.dataset, manifest, SPLIT, min(count, int(manifest.counts(SPLIT).sum())))
        self._module = module.eval().to(device)
        self._codec = load_codec(clips.latents.run, clips.latents.export).to(device)
        self._steps = [module.process.nearest(level) for level in LEVELS]

    def measure(self) -> dict[str, Any]:
        """Measure the weights that the module has; every rank calls this, and has the same.

        Returns:
            `levels`: each log-SNR as (asked, that of the nearest step), and `errors`: mean squared error of the attributes of
            each item at each of them, (items, levels).
        """
        mine = [(item, self._errors(item)) for item in range(self._rank, 2 * self._truth.clips, self._ranks)]
        errors = dict(chain.from_iterable(self._gather(mine)))
        levels = [[asked, used] for asked, (_, used) in zip(LEVELS, self._steps, strict=True)]
        return {"levels": levels, "errors": [errors[item] for item in sorted(errors)]}

    def _errors(self, item: int) -> list[float]:
        clip, direction = self._truth.clip_and_direction(item)
        encoded = encode_clip(self._codec, self._truth.reader, clip)
        speaker, listener = (
            torch.from_numpy(encoded[person][None]).float().to(self._codec.device) for person in speaker_listener(direction)
        )
        windows = range(windows_of(speaker.shape[1]))
        shape = (WINDOW, self._module.target)
        noise = np.stack([normal(shape, "rung noise", *self._truth.key(item), window) for window in windows])[None]
        drawn = [self._module.predict_clean(speaker, listener, torch.from_numpy(noise).to(speaker), step) for step, _ in self._steps]
        shown = Reactor(self._codec, self._module).decode(torch.stack(drawn, dim=1))["attributes"][0]
        return [float(np.mean(np.square(one - self._truth.listener(item), dtype=np.float64))) for one in shown]


def write_rung(run: Store, rung: int, clips: int, progress: int, measured: dict[str, Any]) -> None:
    """Keep what was measured at a rung, in items, on so many clips; the first measurement stands."""
    try:
        run.create(_key(rung, clips), json.dumps({"progress": progress, **measured}, indent=1).encode())
    except AlreadyExists:
        pass


def read_rung(run: Store, rung: int, clips: int, kept_before: bool = True) -> dict[str, Any] | None:
    """What was measured at a rung on so many clips: `progress`, `levels` and `errors`; None if it was not.

    What an earlier release kept without the number of clips in its name counts where it has that many, and where `kept_before` says that
    there may be some: it is a request more.
    """
    try:
        return json.loads(run.read(_key(rung, clips)))
    except NotFound:
        if not kept_before:
            return None
    try:
        measured = json.loads(run.read(f"rungs/{rung:015d}.json"))
    except NotFound:
        return None
    return measured if len(measured["errors"]) == 2 * clips else None


def _key(rung: int, clips: int) -> str:
    return f"rungs/{rung:015d}-{clips}.json"
