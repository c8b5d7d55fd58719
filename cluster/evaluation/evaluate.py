"""Evaluation: reactions to every item of a split, drawn and scored in parts over the cluster, beside the baselines.

Averaged weights, noise keyed by (clip, direction, k), and parts that are kept: an interrupted evaluation goes on where it was.
Parts and scores lie in the run's folder at `evaluation/<id>/`, where the id stands for everything the numbers depend on.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cluster.config.loading import digest
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData
from cluster.evaluation.ground_truth import GroundTruth
from cluster.runs.export import Export, load_reactor, untrained_reactor
from cluster.runs.latents import LatentDataset, corrupt_clips, encode_clip
from cluster.runtime.tasks import map_tasks
from cluster.storage import open_store
from cluster.storage.parallel import parallel_map
from reactdiff.clip import PERSONS, speaker_listener
from reactdiff.data import synthetic
from reactdiff.data.keyed import generator
from reactdiff.determinism import make_deterministic
from reactdiff.generate import Reactor
from reactdiff.metrics import baselines
from reactdiff.metrics.official import Scores, merge
from reactdiff.metrics.part import PartialScores, total
from reactdiff.stage import LATENT

VERSION = 2
PART = 8
"""Items of one part."""

MEAN_CLIPS = 1000
"""Training clips whose mean the mean reaction is."""

MODEL = "model"
WRONG = "wrong speaker"
UNTRAINED = "untrained"
ORACLE = "oracle"
ONLINE_ORACLE = "online oracle"


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated: two exports on the first clips of a split. An item is (clip, direction), row clip + clips * direction."""

    experiment: Experiment
    run: str
    coder: LatentDataset
    diffusion: Export | None
    split: str
    predictions: int
    clips: int
    mean: tuple[float, ...] = ()

    @property
    def starts(self) -> range:
        """The first item of each part."""
        return range(0, 2 * self.clips, PART)

    def file(self, row: str, start: int) -> str:
        """Where a part of a row is kept, without its ending."""
        return f"evaluation/{self.id}/{row.replace(' ', '-')}-{start:09d}"

    def kept(self, row: str) -> PartialScores:
        """What was scored of a row, once it is; of its parts a few are held at a time.

        Raises:
            NotFound: if it is not.
        """
        store = open_store(self.run)
        parts = parallel_map(lambda start: store.read(f"{self.file(row, start)}.npz"), self.starts, ahead=8)
        return total(PartialScores.from_arrays(np.load(io.BytesIO(part), allow_pickle=False)) for part in parts)

    @cached_property
    def sight(self) -> "_Sight":
        """What its tasks see; a process does many of them."""
        return _Sight(self)

    @property
    def id(self) -> str:
        """Stands for everything the scores depend on."""
        trained, asked = self.experiment.diffusion.model_dump(mode="json"), self.diffusion.diffusion if self.diffusion else {}
        other = {name: value for name, value in asked.items() if value != trained[name]}
        facts = [VERSION, self.coder.export.hash, self.diffusion and self.diffusion.hash, self.coder.source_hash, self.experiment.seed]
        return digest([*facts, self.split, self.predictions, self.clips, *([other] if other else [])])

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The model and what it is compared with."""
        names = (MODEL, WRONG, UNTRAINED, "noise", "random listener", "mean reaction", "mimic")
        oracles = (ORACLE, ONLINE_ORACLE) if self.experiment.model.online else (ORACLE,)
        simulated = "simulator" in self.coder.clips.provenance
        return (MODEL,) if not self.experiment.evaluation.baselines else names + (oracles if simulated else ())


def assert_scorable(clips: Manifest, split: str) -> None:
    """A split can be evaluated.

    Raises:
        ValueError: if it is not there, or has no appropriateness matrix.
    """
    if clips.split(split).appropriateness is None:
        scorable = ", ".join(name for name, part in clips.splits.items() if part.appropriateness)
        raise ValueError(
            f"split {split!r} has no appropriateness matrix, so it cannot be scored; "
            + (f"set evaluation.split to one of {scorable}" if scorable else "no split has one: prepare the data with one (docs/data.md)")
        )


def plan_evaluation(experiment: Experiment, run: str, coder: LatentDataset, diffusion: Export | None) -> EvaluationPlan:
    """The evaluation an experiment asks for; arguments as `evaluate`.

    Raises:
        ValueError: if the split is not there or has no appropriateness matrix.
    """
    asked, clips = experiment.evaluation, coder.clips
    assert_scorable(clips, asked.split)
    there = int(clips.counts(asked.split).sum())
    return EvaluationPlan(experiment, run, coder, diffusion, asked.split, asked.predictions, min(asked.clips or there, there))


def evaluate(
    experiment: Experiment, run: str, coder: LatentDataset, diffusion: Export | None, progress: Callable[[int, int], None]
) -> dict[str, Scores]:
    """Score a run's exports as its `evaluation` branch says.

    Args:
        experiment: the run's configuration.
        run: URL of its folder.
        coder: its autoencoder and dataset.
        diffusion: its export of stage 2, if its family has one.
        progress: told (parts done, parts in all).

    Returns:
        Scores by row: the model and, if asked for, the baselines.

    Raises:
        ValueError: if the split is not there or has no appropriateness matrix.
    """
    what = replace(plan_evaluation(experiment, run, coder, diffusion), mean=_mean_attributes(coder))
    calls = [(row, start) for row in what.rows for start in what.starts]
    for done, _ in enumerate(map_tasks(_score, calls, experiment.workers, shared=what)):
        progress(done + 1, len(calls))
    scores = {row: merge([what.kept(row)]) for row in what.rows}
    report = {"evaluation": what.id, "split": what.split, "clips": what.clips, "predictions": what.predictions}
    values = {row: score.to_dict() for row, score in scores.items()}
    open_store(run).put(f"evaluation/{what.split}-{what.id}.json", json.dumps({**report, "scores": values}, indent=1).encode())
    return scores


def _score(what: EvaluationPlan, row: str, start: int) -> None:
    """Make, score and keep one part of one row, unless that is done."""
    store, name = open_store(what.run), what.file(row, start)
    if store.exists(f"{name}.npz"):
        return
    make_deterministic(what.experiment.workers.threads)
    sight = what.sight
    items = range(start, min(start + PART, 2 * what.clips))
    predictions = _predict(sight, row, items)
    if row == MODEL:
        store.put(f"{name}.predictions.npy", _npy(predictions))
    part = sight.score(items, predictions)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **part.to_arrays())
    store.put(f"{name}.npz", buffer.getvalue())


class _Sight(GroundTruth):
    """What a task sees of the data and the models."""

    def __init__(self, what: EvaluationPlan):
        super().__init__(open_store(what.coder.source), what.coder.clips, what.split, what.clips)
        self.what = what
        latents = what.coder.manifest()
        self.latents, self.corrupt = Reader(open_store(what.coder.url), latents, what.split), corrupt_clips(latents, what.split)

    @cached_property
    def trained(self) -> Reactor:
        return load_reactor(open_store(self.what.run), self.what.coder.export, self.what.diffusion)

    @cached_property
    def untrained(self) -> Reactor:
        return untrained_reactor(self.what.coder.export, self.what.diffusion)

    def stranger(self, item: int) -> int:
        """An item whose reaction does not suit this speaker, nor this item's that one's: of another script."""
        others = np.flatnonzero(~self.matrix[item] & ~self.matrix[:, item])
        return int(generator("stranger", self.what.experiment.seed, *self.key(item)).choice(others)) if others.size else item

    def speaker_latent(self, item: int) -> np.ndarray:
        clip, direction = self.place(item)
        source = (speaker_listener(direction)[0], LATENT)
        if clip in self.corrupt:  # nothing is scored on zeros: the source is whole by now, or this raises
            return encode_clip(self.trained.codec, self.reader, clip)[source[0]]
        return self.latents.read(clip, [source]).arrays[source]


def _predict(sight: _Sight, row: str, items: range) -> np.ndarray:
    """Predictions of a row, (items, K, frames, 25)."""
    what = sight.what
    if row in (MODEL, WRONG, UNTRAINED):
        reactor = sight.untrained if row == UNTRAINED else sight.trained
        speakers = np.stack([sight.speaker_latent(sight.stranger(item) if row == WRONG else item) for item in items])
        return reactor.react(speakers, [sight.key(item) for item in items], what.predictions, what.experiment.seed)["attributes"]
    return _baseline(sight, row, items)


def _baseline(sight: _Sight, row: str, items: range) -> np.ndarray:
    """Predictions that need no model, (items, K, frames, 25)."""
    what, keys = sight.what, [sight.key(item) for item in items]
    seed, count, frames = what.experiment.seed, what.predictions, what.coder.clips.frames
    if row == "noise":
        return baselines.noise(keys, count, frames, seed)
    if row == "random listener":
        drawn = baselines.random_listener(keys, sight.matrix[items.start : items.stop], count, seed)
        return np.stack([[sight.listener(int(other)) for other in others] for others in drawn])
    if row == "mean reaction":
        return baselines.mean_reaction(len(items), count, frames, np.array(what.mean))
    if row == "mimic":
        return baselines.mimic(np.stack([sight.speaker(item) for item in items]), count)
    assert row in (ORACLE, ONLINE_ORACLE)
    return np.stack([synthetic.oracle(what.coder.clips.provenance, *key, count, online=row == ONLINE_ORACLE) for key in keys])


def _mean_attributes(coder: LatentDataset) -> tuple[float, ...]:
    """Mean of the training split's attributes over its first clips, (25,); without those that training was to do without, too."""
    reader = Reader(open_store(coder.source), coder.clips, coder.split)
    wanted, means = [(person, "attributes") for person in PERSONS], []
    for clip in range(min(reader.clips, MEAN_CLIPS)):
        try:
            means.append(np.mean(list(reader.read(clip, wanted).arrays.values()), axis=(0, 1)))
        except CorruptData:
            if coder.on_corrupt == "stop":
                raise
    return tuple(np.mean(means, axis=0).tolist())


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
