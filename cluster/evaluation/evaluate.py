"""Evaluation: reactions to every item of a split, drawn and scored in parts over the cluster, beside the baselines.

Averaged weights, noise keyed by (clip, direction, k), and parts that are kept: an interrupted evaluation goes on where it was.
Parts and scores lie in the run's folder at `evaluation/<id>/`, where the id stands for everything the numbers depend on.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np

from cluster.config.schema import Experiment
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData, encode_npy
from cluster.evaluation.plan import EvaluationPlan, plan_evaluation
from cluster.evaluation.rows import MODEL, ROWS, RowInputs, rows_of
from cluster.runs.export import Export
from cluster.runs.latents import LatentDataset
from cluster.runtime.tasks import map_tasks
from cluster.storage import Store
from cluster.storage.parallel import parallel_map
from reactdiff.clip import PERSONS
from reactdiff.determinism import make_deterministic
from reactdiff.metrics.official import Scores, merge

MEAN_CLIPS = 1000
"""Training clips whose mean the mean reaction is."""


def evaluate(
    experiment: Experiment, run: Store, latents: LatentDataset, diffusion: Export | None, progress: Callable[[int, int], None]
) -> dict[str, Scores]:
    """Score a run's exports as its `evaluation` branch says.

    Args:
        experiment: the run's configuration.
        run: its folder.
        latents: its autoencoder and dataset.
        diffusion: its export of stage 2, if its family has one.
        progress: told (parts done, parts in all).

    Returns:
        Scores by row: the model and, if asked for, the baselines.

    Raises:
        ValueError: if the split is not there or has no appropriateness matrix.
    """
    plan = replace(plan_evaluation(experiment, run, latents, diffusion), mean=_mean_attributes(latents))
    rows = rows_of(plan)
    calls = [(row, start) for row in rows for start in plan.starts]
    there = {entry.key.removesuffix(".npz") for entry in run.list(f"{plan.folder}/")}
    missing = [call for call in calls if plan.file(*call) not in there]
    kept = range(len(calls) - len(missing))
    for done, _ in enumerate(chain(kept, map_tasks(_score, missing, experiment.workers, shared=_Task(plan))), start=1):
        progress(done, len(calls))
    scores = {row: merge([plan.read_row(row)]) for row in rows}
    report = {"evaluation": plan.id, "split": plan.split, "clips": plan.clips, "predictions": plan.predictions}
    values = {row: score.to_dict() for row, score in scores.items()}
    run.put(f"evaluation/{plan.split}-{plan.id}.json", json.dumps({**report, "scores": values}, indent=1).encode())
    return scores


@dataclass(frozen=True)
class _Task:
    """What the tasks of an evaluation share; a process answers many of them."""

    plan: EvaluationPlan

    @cached_property
    def inputs(self) -> RowInputs:
        return RowInputs(self.plan)


def _score(task: _Task, row: str, start: int) -> None:
    """Make, score and keep one part of one row, unless that is done."""
    plan, run = task.plan, task.plan.run
    name, items = plan.file(row, start), plan.items(start)
    if run.exists(f"{name}.npz"):  # this task's machine was lost behind it
        return
    make_deterministic(plan.experiment.workers.threads)
    predictions = ROWS[row].draw(task.inputs, items)
    if row == MODEL:
        run.put(f"{name}.predictions.npy", encode_npy(predictions))
    part = task.inputs.score(items, predictions)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **part.to_arrays())
    run.put(f"{name}.npz", buffer.getvalue())


def _mean_attributes(latents: LatentDataset) -> tuple[float, ...]:
    """Mean of the training split's attributes over its first clips, (25,); without those that training was to do without, too."""
    reader = Reader(latents.dataset, latents.clips, latents.split)
    wanted = [(person, "attributes") for person in PERSONS]

    def mean(clip: int) -> np.ndarray | None:
        try:
            return np.mean(list(reader.read(clip, wanted).arrays.values()), axis=(0, 1))
        except CorruptData:
            if latents.on_corrupt == "stop":
                raise
            return None

    means = parallel_map(mean, range(min(reader.clips, MEAN_CLIPS)))
    return tuple(np.mean([one for one in means if one is not None], axis=0).tolist())
