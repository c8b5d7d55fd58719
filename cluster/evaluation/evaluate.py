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
from cluster.data.shards import encode_npy
from cluster.evaluation.plan import EvaluationPlan, plan_evaluation
from cluster.evaluation.rows import MODEL, RowInputs, predictions_file, rows_of, training_attributes
from cluster.runs.export import Export
from cluster.runs.latents import LatentDataset
from cluster.runtime.tasks import Account, map_tasks
from cluster.storage import Store
from reactdiff.determinism import make_deterministic
from reactdiff.metrics.official import Scores, merge

MEAN_CLIPS = 1000
"""Training clips whose mean the mean reaction is."""


def evaluate(
    experiment: Experiment,
    run: Store,
    latents: LatentDataset,
    diffusion: Export | None,
    progress: Callable[[int, int], None],
    account: Account | None = None,
) -> dict[str, Scores]:
    """Score a run's exports as its `evaluation` branch says.

    Args:
        experiment: the run's configuration.
        run: its folder.
        latents: its autoencoder and dataset.
        diffusion: its export of stage 2, if its family has one.
        progress: told (parts done, parts in all).
        account: told where the time of the tasks goes.

    Returns:
        Scores by row: the model and, if asked for, the baselines.

    Raises:
        ValueError: if the split is not there or has no appropriateness matrix.
    """
    plan = replace(plan_evaluation(experiment, run, latents, diffusion), mean=_mean_attributes(latents))
    rows = rows_of(experiment, latents.clips.provenance)
    calls = [(row, start) for row in rows for start in plan.starts]
    there = {entry.key.removesuffix(".npz") for entry in run.list(f"{plan.folder}/")}
    missing = [call for call in calls if plan.file(*call) not in there]
    kept = range(len(calls) - len(missing))
    scored = map_tasks(_score, missing, experiment.workers, shared=_Task(plan), account=account)
    for done, _ in enumerate(chain(kept, scored), start=1):
        progress(done, len(calls))
    scores = {row: merge([plan.read_row(row)]) for row in rows}
    values = {row: score.to_dict() for row, score in scores.items()}
    document = {"evaluation": plan.id, **plan.facts, "scores": values}
    run.put(f"evaluation/{plan.split}-{plan.id}.json", json.dumps(document, indent=1).encode())
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
    predictions = rows_of(plan.experiment, plan.latents.clips.provenance)[row](task.inputs, items)
    if row == MODEL:
        run.put(predictions_file(plan, start), encode_npy(predictions))
    part = task.inputs.score(items, predictions)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **part.to_arrays())
    run.put(f"{name}.npz", buffer.getvalue())


def _mean_attributes(latents: LatentDataset) -> tuple[float, ...]:
    """Mean of the training split's attributes over its first clips, (25,)."""
    return tuple(np.mean([faces.mean(axis=(0, 1)) for faces in training_attributes(latents, MEAN_CLIPS)], axis=0).tolist())
