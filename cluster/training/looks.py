"""What is looked at while a stage is trained, from averaged weights that the ranks have in memory; training does not notice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.data.stream import Share
from cluster.evaluation.rung import RungMeter, read_rung, write_rung
from cluster.evaluation.validation import Validator
from cluster.runs.checkpoint import Checkpoint
from cluster.telemetry.meter import Meter
from cluster.telemetry.metrics_log import MetricsLog, read_rows, validation_name
from cluster.training.job import Job, Place
from cluster.training.spread import spread
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Stage

Stretches = list[tuple[str, int, torch.Tensor]]
"""Of some parameters: name, first element, elements."""


class Looks:
    """Scores of `val` and errors at rungs, of the checkpoints that are to have them. All ranks call each method, in the same order.

    Args:
        job: what is trained.
        place: this rank.
        kind: the stage.
        share: of each step, this rank's.
        meter: has the time, and the scores as gauges.
        gather: collects one object of every rank on all of them.
        on_cadence: whether a step, between its progress before and after, has a checkpoint that no clock and no fault asked for:
            only those are scored.
    """

    def __init__(
        self,
        job: Job,
        place: Place,
        kind: Stage,
        share: Share,
        meter: Meter,
        gather: Callable[[Any], list[Any]],
        on_cadence: Callable[[int, int], bool],
    ):
        self._job, self._share, self._meter, self._gather, self._on_cadence = job, share, meter, gather, on_cadence
        self._first = place.rank == 0
        self._evaluation, self._name = job.experiment.evaluation, validation_name(job.stage)
        self._validator: Validator | None = None
        self._rung_meter: RungMeter | None = None
        self._module = kind.module() if job.validation else None
        if job.validation and self._module:
            ours = gather, place.rank, place.ranks, place.device
            if self._evaluation.watch:
                self._validator = Validator(job.experiment, job.validation, self._module, *ours)
            if self._evaluation.rungs and isinstance(self._module, LatentDiffusion):
                self._rung_meter = RungMeter(job.validation, self._evaluation.rung_clips, self._module, *ours)
        logs = self._first and self._validator
        self._log = MetricsLog(job.run, job.life, job.attempt, self._name) if logs else None
        self._scores, self._measures, self._progress = False, list[int](), 0

    def rungs(self, before: int, after: int) -> list[int]:
        """The rungs that a step reaches: its checkpoint is measured."""
        return [rung for rung in self._evaluation.rungs if before < rung <= after] if self._rung_meter else []

    def take(self, found: Checkpoint, averages: Callable[[], Stretches], stage: nn.Module, new: bool = True) -> None:
        """Copy the averaged weights of a checkpoint, if it is to be looked at.

        Args:
            found: the checkpoint.
            averages: what this rank holds of the averaged weights that are in it.
            stage: whose buffers are those of the checkpoint.
            new: whether it was written just now; of another one there may be scores.
        """
        before = found.progress - self._share.batch
        self._scores = bool(self._validator) and self._on_cadence(before, found.progress) and (new or not self._scored(found))
        self._measures = [rung for rung in self.rungs(before, found.progress) if not self._measured(rung)]
        self._progress = found.progress
        if self._module and (self._scores or self._measures):
            spread(averages(), self._module, self._gather)
            for name, buffer in stage.named_buffers():
                self._module.get_buffer(name).copy_(buffer)

    def look(self) -> None:
        """Score and measure what was taken, once."""
        if self._validator and self._scores:
            with self._meter.phase("evaluation"):
                scores = self._validator.validate()
                self._meter.gauges.update(val_progress_items=self._progress, val_frcorr=scores["FRCorr"], val_frdist=scores["FRDist"])
                if self._log is not None:
                    self._log.add(progress=self._progress, **scores)
                    self._log.flush()
        if self._rung_meter and self._measures:
            with self._meter.phase("evaluation"):
                for rung in self._measures:
                    measured = self._rung_meter.measure()
                    if self._first:
                        write_rung(self._job.run, rung, self._evaluation.rung_clips, self._progress, measured)
        self._scores, self._measures = False, []

    def _scored(self, found: Checkpoint) -> bool:
        rows = read_rows(self._job.run, self._name) if self._first else []
        return self._gather(any(row["progress"] == found.progress for row in rows))[0]

    def _measured(self, rung: int) -> bool:
        return self._gather(self._first and read_rung(self._job.run, rung, self._evaluation.rung_clips) is not None)[0]
