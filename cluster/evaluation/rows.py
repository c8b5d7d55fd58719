"""The rows of an evaluation: the model, and beside it what shows how its scores are to be read. `ROWS` has all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cluster.data.reader import Reader
from cluster.evaluation.ground_truth import GroundTruth
from cluster.evaluation.plan import EvaluationPlan
from cluster.runs.export import load_reactor, untrained_reactor
from cluster.runs.latents import corrupt_clips, encode_clip
from reactdiff.clip import speaker_listener
from reactdiff.data import synthetic
from reactdiff.data.keyed import generator
from reactdiff.generate import Reactor
from reactdiff.metrics import baselines
from reactdiff.stage import LATENT

MODEL = "model"
WRONG = "wrong speaker"
UNTRAINED = "untrained"
RANDOM = "random listener"
ORACLE = "oracle"
ONLINE_ORACLE = "online oracle"


class RowInputs(GroundTruth):
    """What rows are made of: the split's ground truth, the speakers' latents and the models. A process opens them once."""

    def __init__(self, plan: EvaluationPlan):
        super().__init__(plan.latents.dataset, plan.latents.clips, plan.split, plan.clips)
        self.plan = plan
        latents = plan.latents.manifest()
        self._latents, self._corrupt = Reader(plan.latents.store, latents, plan.split), corrupt_clips(latents, plan.split)

    @cached_property
    def trained(self) -> Reactor:
        """The model."""
        return load_reactor(self.plan.run, self.plan.latents.export, self.plan.diffusion)

    @cached_property
    def untrained(self) -> Reactor:
        """The same with the weights that training began with."""
        return untrained_reactor(self.plan.latents.export, self.plan.diffusion)

    def keys(self, items: range) -> list[tuple[str, int]]:
        """(clip key, direction) of each item."""
        return [self.key(item) for item in items]

    def stranger(self, item: int) -> int:
        """An item whose reaction does not suit this speaker, nor this item's that one's: of another script."""
        others = np.flatnonzero(~self.matrix[item] & ~self.matrix[:, item])
        return int(generator("stranger", self.plan.experiment.seed, *self.key(item)).choice(others)) if others.size else item

    def speaker_latent(self, item: int) -> np.ndarray:
        """The encoded speaker, (frames, latent)."""
        clip, direction = self.clip_and_direction(item)
        source = (speaker_listener(direction)[0], LATENT)
        if clip in self._corrupt:  # nothing is scored on zeros: the source is whole by now, or this raises
            return encode_clip(self.trained.codec, self.reader, clip)[source[0]]
        return self._latents.read(clip, [source]).arrays[source]

    def react(self, reactor: Reactor, speakers: list[int], items: range) -> np.ndarray:
        """Reactions to the speakers of other or the same items, drawn with the noise of these, (items, K, frames, 25)."""
        latents = np.stack([self.speaker_latent(speaker) for speaker in speakers])
        return reactor.react(latents, self.keys(items), self.plan.predictions, self.plan.experiment.seed)["attributes"]


Draw = Callable[[RowInputs, range], np.ndarray]
"""(inputs, items) -> predictions (items, K, frames, 25)."""


def _model(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.trained, list(items), items)


def _wrong_speaker(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.trained, [inputs.stranger(item) for item in items], items)


def _untrained(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.untrained, list(items), items)


def _noise(inputs: RowInputs, items: range) -> np.ndarray:
    plan = inputs.plan
    return baselines.noise(inputs.keys(items), plan.predictions, plan.latents.clips.frames, plan.experiment.seed)


def _random_listener(inputs: RowInputs, items: range) -> np.ndarray:
    suits = inputs.matrix[items.start : items.stop]
    drawn = baselines.random_listener(inputs.keys(items), suits, inputs.plan.predictions, inputs.plan.experiment.seed)
    return np.stack([[inputs.listener(int(other)) for other in others] for others in drawn])


def _mean_reaction(inputs: RowInputs, items: range) -> np.ndarray:
    plan = inputs.plan
    return baselines.mean_reaction(len(items), plan.predictions, plan.latents.clips.frames, np.array(plan.mean))


def _mimic(inputs: RowInputs, items: range) -> np.ndarray:
    return baselines.mimic(np.stack([inputs.speaker(item) for item in items]), inputs.plan.predictions)


def _oracle(inputs: RowInputs, items: range, online: bool = False) -> np.ndarray:
    simulation, count = inputs.plan.latents.clips.provenance, inputs.plan.predictions
    return np.stack([synthetic.oracle(simulation, *key, count, online=online) for key in inputs.keys(items)])


def _online_oracle(inputs: RowInputs, items: range) -> np.ndarray:
    return _oracle(inputs, items, online=True)


def _always(plan: EvaluationPlan) -> bool:
    return True


def _with_baselines(plan: EvaluationPlan) -> bool:
    return plan.experiment.evaluation.baselines


def _simulated(plan: EvaluationPlan) -> bool:
    return _with_baselines(plan) and "simulator" in plan.latents.clips.provenance


def _simulated_online(plan: EvaluationPlan) -> bool:
    return _simulated(plan) and plan.experiment.model.online


@dataclass(frozen=True)
class Row:
    """One row: how its predictions are drawn, and in which evaluations it stands."""

    draw: Draw
    stands: Callable[[EvaluationPlan], bool] = _with_baselines


ROWS = {
    MODEL: Row(_model, _always),
    WRONG: Row(_wrong_speaker),
    UNTRAINED: Row(_untrained),
    "noise": Row(_noise),
    RANDOM: Row(_random_listener),
    "mean reaction": Row(_mean_reaction),
    "mimic": Row(_mimic),
    ORACLE: Row(_oracle, _simulated),
    ONLINE_ORACLE: Row(_online_oracle, _simulated_online),
}
"""Every row by name, in the order of the table."""


def rows_of(plan: EvaluationPlan) -> tuple[str, ...]:
    """The names of the rows that an evaluation has."""
    return tuple(name for name, row in ROWS.items() if row.stands(plan))
