"""The rows of an evaluation: the model, and beside it what shows how its scores are to be read."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from cluster.config.schema import Experiment
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData, decode_npy
from cluster.evaluation.ground_truth import GroundTruth
from cluster.evaluation.plan import EvaluationPlan
from cluster.runs.export import load_reactor, untrained_reactor
from cluster.runs.latents import LatentDataset, corrupt_clips, encode_clip
from cluster.runtime.stuck import alive
from cluster.storage import NotFound
from cluster.storage.parallel import parallel_map
from reactdiff.clip import AU, PERSONS, speaker_listener
from reactdiff.config import Model
from reactdiff.data import synthetic
from reactdiff.data.keyed import generator
from reactdiff.data.synthetic.oracles import Oracle, ladder
from reactdiff.generate import Reactor
from reactdiff.metrics import baselines
from reactdiff.metrics.retrieval import Retrieval

MODEL = "model"
CUT = "units cut at 0.5"
WRONG = "wrong speaker"
UNTRAINED = "untrained"
REAL_PAST = "under the real past"
RANDOM = "random listener"

RECORDINGS = 400
"""Training clips that retrieval searches."""


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
        return _heard(load_reactor(self.plan.run, self.plan.latents.export, self.plan.diffusion))

    @cached_property
    def untrained(self) -> Reactor:
        """The same with the weights that training began with."""
        return _heard(untrained_reactor(self.plan.latents.export, self.plan.diffusion))

    @cached_property
    def retrieval(self) -> Retrieval:
        """Real reactions of the training split, to be looked up."""
        faces = np.concatenate(list(training_attributes(self.plan.latents, RECORDINGS)))
        reactions = faces.reshape(-1, 2, *faces.shape[1:])[:, ::-1].reshape(faces.shape)  # the other person of each clip
        return Retrieval(faces, reactions, chunk_of(self.plan.experiment.model))

    def keys(self, items: range) -> list[tuple[str, int]]:
        """(clip key, direction) of each item."""
        return [self.key(item) for item in items]

    @cached_property
    def strangers(self) -> np.ndarray:
        """Who had another conversation than whom, (2 clips, 2 clips) bool."""
        return baselines.strangers(self.matrix)

    def stranger(self, item: int) -> int:
        """An item of another conversation; the item itself where there is none."""
        others = np.flatnonzero(self.strangers[item])
        return int(generator("stranger", self.plan.experiment.seed, *self.key(item)).choice(others)) if others.size else item

    def latent(self, item: int, role: int) -> np.ndarray:
        """The encoded speaker (role 0) or real listener (1), (frames, latent)."""
        clip, direction = self.clip_and_direction(item)
        person = speaker_listener(direction)[role]
        if clip in self._corrupt:  # nothing is scored on zeros: the source is whole by now, or this raises
            return encode_clip(self.trained.codec, self.reader, clip)[person]
        parts = [(person, part) for part in self.plan.latents.parts]
        read = self._latents.read(clip, parts).arrays
        return np.concatenate([read[part] for part in parts], axis=-1)

    def react(self, reactor: Reactor, speakers: list[int], items: range, listeners: np.ndarray | None = None) -> np.ndarray:
        """Reactions to the speakers of other or the same items, drawn with the noise of these, (items, K, frames, 25)."""
        latents = np.stack([self.latent(speaker, 0) for speaker in speakers])
        return reactor.react(latents, self.keys(items), self.plan.predictions, self.plan.experiment.seed, listeners)["attributes"]


def _heard(reactor: Reactor) -> Reactor:
    """The same; from now on each call of its denoiser says that the process gets on: a part of large models may take an hour."""
    if reactor.diffusion is not None:
        reactor.diffusion.denoiser.register_forward_hook(lambda *_: alive())
    return reactor


Draw = Callable[[RowInputs, range], np.ndarray]
"""(inputs, items) -> predictions (items, K, frames, 25)."""


def _model(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.trained, list(items), items)


def _cut(inputs: RowInputs, items: range) -> np.ndarray:
    try:  # most were drawn before, for the model's own row
        drawn = decode_npy(inputs.plan.run.read(predictions_file(inputs.plan, items.start)))
    except NotFound:
        drawn = _model(inputs, items)
    return np.concatenate([(drawn[..., AU] > 0.5).astype(drawn.dtype), drawn[..., AU.stop :]], axis=-1)


def _wrong_speaker(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.trained, [inputs.stranger(item) for item in items], items)


def _under_real_past(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.trained, list(items), items, np.stack([inputs.latent(item, 1) for item in items]))


def _untrained(inputs: RowInputs, items: range) -> np.ndarray:
    return inputs.react(inputs.untrained, list(items), items)


def _noise(inputs: RowInputs, items: range) -> np.ndarray:
    plan = inputs.plan
    return baselines.noise(inputs.keys(items), plan.predictions, plan.latents.clips.frames, plan.experiment.seed)


def _random_listener(inputs: RowInputs, items: range) -> np.ndarray:
    others = inputs.strangers[items.start : items.stop]
    drawn = baselines.random_listener(inputs.keys(items), others, inputs.plan.predictions, inputs.plan.experiment.seed)
    return np.stack([[inputs.listener(int(other)) for other in others] for others in drawn])


def _mean_reaction(inputs: RowInputs, items: range) -> np.ndarray:
    plan = inputs.plan
    return baselines.mean_reaction(len(items), plan.predictions, plan.latents.clips.frames, np.array(plan.mean))


def _mimic(inputs: RowInputs, items: range) -> np.ndarray:
    return baselines.mimic(np.stack([inputs.speaker(item) for item in items]), inputs.plan.predictions)


def _retrieval(inputs: RowInputs, items: range) -> np.ndarray:
    return np.stack([inputs.retrieval.react(inputs.speaker(item), inputs.plan.predictions, inputs.key(item)) for item in items])


def _oracle(knows: Oracle) -> Draw:
    def draw(inputs: RowInputs, items: range) -> np.ndarray:
        simulation, count = inputs.plan.latents.clips.provenance, inputs.plan.predictions
        return np.stack([synthetic.oracle(simulation, *key, count, knows) for key in inputs.keys(items)])

    return draw


BASELINES: dict[str, Draw] = {
    WRONG: _wrong_speaker,
    UNTRAINED: _untrained,
    "noise": _noise,
    RANDOM: _random_listener,
    "mean reaction": _mean_reaction,
    "mimic": _mimic,
}
"""What stands beside a model on any data, in the order of the table."""


def rows_of(experiment: Experiment, provenance: Mapping[str, Any]) -> dict[str, Draw]:
    """The rows that an evaluation has, by name in the order of the table, and how their predictions are drawn.

    Args:
        experiment: whose model is evaluated.
        provenance: of the dataset's manifest; only simulated data has oracles.
    """
    rows: dict[str, Draw] = {MODEL: _model, CUT: _cut}  # real units are 0 or 1; a decoder's or denoiser's are not quite
    if experiment.evaluation.baselines:
        if experiment.model.online and experiment.model.denoiser == "transformer":
            rows[REAL_PAST] = _under_real_past
        rows |= BASELINES | {retrieval_name(chunk_of(experiment.model)): _retrieval}
        if "simulator" in provenance:
            rows |= {name: _oracle(knows) for name, knows in ladder(chunk_of(experiment.model)).items()}
    return rows


def predictions_file(plan: EvaluationPlan, start: int) -> str:
    """Where the model's reactions to the items of a part are kept."""
    return f"{plan.file(MODEL, start)}.predictions.npy"


def retrieval_name(chunk: int) -> str:
    """The name of the retrieval beside models that react in chunks of so many frames (0: to whole clips)."""
    return f"online retrieval {chunk}" if chunk else "retrieval"


def training_attributes(latents: LatentDataset, most: int) -> Iterator[np.ndarray]:
    """Both persons' attributes, (2, frames, 25), of the training split's first clips, without those that training was to do without."""
    reader, wanted = Reader(latents.dataset, latents.clips, latents.split), [(person, "attributes") for person in PERSONS]

    def read(clip: int) -> np.ndarray | None:
        try:
            found = reader.read(clip, wanted).arrays
            return np.stack([found[key] for key in wanted])
        except CorruptData:
            if latents.on_corrupt == "stop":
                raise
            return None

    return (found for found in parallel_map(read, range(min(reader.clips, most))) if found is not None)


def chunk_of(model: Model) -> int:
    """Frames that a model reacts in at once, knowing of the speaker only what came before; 0: it hears the whole clip."""
    return model.chunk if model.online else 0
