"""What an evaluation is: which exports on which clips, the id that stands for its numbers, and where its parts lie."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cluster.config.identity import digest
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.runs.export import Export
from cluster.runs.latents import LatentDataset
from cluster.storage import Store
from cluster.storage.parallel import parallel_map
from reactdiff.metrics.partial import PartialScores, total

VERSION = 4
REVISIONS = {"wrong speaker": 2, "random listener": 2}
"""Rows that are drawn otherwise since that version: they alone are scored again, and an evaluation that has none of them is as it was."""
PART = 8
"""Items of one part."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Two exports on the first clips of a split. An item is (clip, direction), row clip + clips * direction.

    Attributes:
        experiment: the run's configuration.
        run: its folder.
        latents: its autoencoder and dataset.
        diffusion: its export of stage 2, if its family has one.
        split: that is scored.
        predictions: reactions of each item (K).
        clips: that are scored, the first ones.
        mean: attributes of the mean reaction, (25,).
    """

    experiment: Experiment
    run: Store
    latents: LatentDataset
    diffusion: Export | None
    split: str
    predictions: int
    clips: int
    mean: tuple[float, ...] = ()

    @property
    def starts(self) -> range:
        """The first item of each part."""
        return range(0, 2 * self.clips, PART)

    def items(self, start: int) -> range:
        """The items of the part that begins here."""
        return range(start, min(start + PART, 2 * self.clips))

    @cached_property
    def folder(self) -> str:
        """Where its parts are kept."""
        return f"evaluation/{self.id}"

    def file(self, row: str, start: int) -> str:
        """Where a part of a row is kept, without its ending."""
        return f"{self.folder}/{revised(row).replace(' ', '-')}-{start:09d}"

    def read_row(self, row: str) -> PartialScores:
        """What was scored of a row, once it is; of its parts a few are held at a time.

        Raises:
            NotFound: if it is not.
        """
        parts = parallel_map(lambda start: self.run.read(f"{self.file(row, start)}.npz"), self.starts, ahead=8)
        return total(PartialScores.from_arrays(np.load(io.BytesIO(part), allow_pickle=False)) for part in parts)

    @property
    def otherwise(self) -> dict[str, Any]:
        """How the reactions are drawn, where that is not as the run's configuration says."""
        trained, asked = self.experiment.diffusion.model_dump(mode="json"), self.diffusion.diffusion if self.diffusion else {}
        return {name: value for name, value in asked.items() if value != trained[name]}

    @property
    def facts(self) -> dict[str, Any]:
        """What is scored, and how it is drawn, for who reads the scores."""
        return {"split": self.split, "clips": self.clips, "predictions": self.predictions, "otherwise": self.otherwise}

    @property
    def id(self) -> str:
        """Stands for everything the scores depend on."""
        other = self.otherwise
        facts = [VERSION, self.latents.export.hash, self.diffusion and self.diffusion.hash, self.latents.source_hash, self.experiment.seed]
        return digest([*facts, self.split, self.predictions, self.clips, *([other] if other else [])])


def revised(row: str) -> str:
    """A row's name, with the revision of how it is drawn, if there is one."""
    return f"{row} {REVISIONS[row]}" if row in REVISIONS else row


def plan_evaluation(experiment: Experiment, run: Store, latents: LatentDataset, diffusion: Export | None) -> EvaluationPlan:
    """The evaluation that an experiment's `evaluation` branch asks for.

    Raises:
        ValueError: if the split is not there or has no appropriateness matrix.
    """
    asked, clips = experiment.evaluation, latents.clips
    assert_scorable(clips, asked.split)
    there = int(clips.counts(asked.split).sum())
    return EvaluationPlan(experiment, run, latents, diffusion, asked.split, asked.predictions, min(asked.clips or there, there))


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
