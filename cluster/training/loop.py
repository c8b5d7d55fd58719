"""The training loop every rank runs. It needs torch.distributed and a store, not Ray."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from cluster.config.identity import identity
from cluster.config.schema import Experiment
from cluster.data.cache import Cache
from cluster.data.manifest import load_manifest
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.reader import Reader
from cluster.data.stream import Batch, Share, Stream
from cluster.evaluation.validation import ValidationClips, Validator
from cluster.runs import checkpoint
from cluster.runs.checkpoint import Checkpoint, CheckpointWriter
from cluster.runs.latents import corrupt_clips, read_range
from cluster.runs.state import Attempt, assert_newest_life
from cluster.runtime.device import peak_flops, peak_memory
from cluster.storage import Store
from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.metrics_log import MetricsLog, read_rows, validation_name
from cluster.training.engine import Engine, engine_settings
from cluster.training.resume import candidates, restore
from cluster.training.warm_start import warm_start
from reactdiff.data.keyed import seed_of
from reactdiff.data.order import Order
from reactdiff.determinism import make_deterministic
from reactdiff.learning_rate import learning_rate
from reactdiff.model.flops import training_flops
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, build, empty_batch, stage

log = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """A loss or gradient is not a number any more; names the items of the step."""

    failure = "non_finite"


@dataclass(frozen=True)
class Job:
    """What one worker group does: train one stage of one run to the end.

    Attributes:
        experiment: the whole configuration.
        stage: "autoencoder" or "diffusion".
        run: folder of the run.
        life: this start of the driver.
        dataset: what the stage reads: clips or latents.
        manifest: hash of the dataset's state.
        validation: clips that are scored at each checkpoint.
        attempt: how often a worker group of this life was started before, for this stage or an earlier one.
    """

    experiment: Experiment
    stage: str
    run: Store
    life: int
    dataset: Store
    manifest: str
    validation: ValidationClips | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where it computes."""

    rank: int
    ranks: int
    device: torch.device


class Verdict(NamedTuple):
    """What a rank brings to the one small all-reduce of a step, and summed over the ranks what all of them know after it.

    Attributes:
        loss: of this step, the part of the mean.
        ledger: sum of the CRC32C of the bytes the step was made of; exact below 2^53.
        next_valid: items of the next step that count.
        uploaded: whether the part of the checkpoint is uploaded; how many ranks' have.
        next_corrupt: items of the next step that were found damaged.
    """

    loss: float
    ledger: float
    next_valid: float
    uploaded: float
    next_corrupt: float

    def summed(self, device: torch.device) -> "Verdict":
        """The sums over all ranks."""
        sums = torch.tensor(self, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return Verdict(*sums.tolist())


def train(job: Job, place: Place, report: Callable[[Snapshot], None]) -> dict[str, Any]:
    """Train a stage from its newest whole checkpoint to its end; every rank of the group calls this.

    Args:
        job: what to do.
        place: this rank.
        report: takes this rank's cumulative numbers, about once a second.

    Returns:
        progress, steps, loss of the last step, and how many items are quarantined.

    Raises:
        NonFinite, CorruptData, NoUsableCheckpoint, StorageError, Superseded: the run must not go on.
    """
    meter = Meter(place.rank, place.ranks, job.stage)
    make_deterministic(job.experiment.workers.threads)
    with _reporting(meter, report):
        training = _Training(job, place, meter)
        try:
            return training.run()
        finally:
            training.stream.close()


class _Training:
    def __init__(self, job: Job, place: Place, meter: Meter):
        experiment, optim = job.experiment, job.experiment.optim
        self.job, self.place, self.meter, self.optim = job, place, meter, optim
        manifest = load_manifest(job.dataset, job.manifest)
        data = experiment.data
        self.cache = Cache(Path(data.cache), int(1e9 * data.cache_limit)) if data.cache else None
        self.reader = Reader(job.dataset, manifest, data.split, self.cache)
        self.order = Order(2 * self.reader.counts, experiment.seed, data.block, data.group, data.order)
        total, batch = int(optim.epochs[job.stage] * self.order.items), optim.batch[job.stage]
        self.share = Share(batch, total, place.ranks, place.rank)
        source = Source(manifest.stream_specs, manifest.frames)
        kind = stage(job.stage, experiment.model, experiment.diffusion, source)
        with torch.device("meta"):
            self.flops = training_flops(kind.module(), empty_batch(kind, 1, "meta"))
        meter.gauges["peak_flops"] = peak_flops(place.device, optim.precision)
        self.quarantine = Quarantine(
            BadItem(2 * clip + side, 0, why) for clip, why in corrupt_clips(manifest, data.split).items() for side in (0, 1)
        )
        self.stream = Stream(
            self.reader,
            kind,
            self.order,
            self.share,
            experiment.seed,
            int(1e6 * data.read_ahead),
            data.readers,
            pin=place.device.type == "cuda",
            quarantine=self.quarantine if data.on_corrupt == "quarantine" else None,
        )
        module = build(kind, experiment.seed)
        warm_start(module, job.stage, experiment, log.warning if place.rank == 0 else log.debug)
        if isinstance(module, LatentDiffusion):
            module.set_range(*read_range(job.dataset, manifest))
        self.engine = Engine(module, engine_settings(experiment, job.stage, place.ranks), place.device)
        self.writer = CheckpointWriter(job.run, _gather, place.rank, experiment.run.keep, self.superseded)
        self.log = MetricsLog(job.run, job.life, job.attempt, job.stage) if place.rank == 0 else None
        self.validator: Validator | None = None
        if job.validation:
            ranks = place.rank, place.ranks
            self.validator = Validator(experiment, job.validation, job.run, kind.module(), _gather, *ranks, place.device)
        validates = place.rank == 0 and job.validation
        self.validation_log = MetricsLog(job.run, job.life, job.attempt, validation_name(job.stage)) if validates else None

    def run(self) -> dict[str, Any]:
        step, loss = self.resume(), float("nan")
        batches = self.stream.batches(step)
        batch = self.fetch(batches)
        valid = int(self.agree(torch.zeros(()), None, batch).next_valid)
        while batch is not None:
            loss_part = self.forward_backward(batch, valid)
            upcoming = self.fetch(batches)
            with self.meter.phase("backward"):  # on a GPU, here the host waits for what it only queued
                verdict = self.agree(loss_part, batch, upcoming)
            self.update(batch, verdict)
            batch, valid, loss = upcoming, int(verdict.next_valid), verdict.loss
        if self.writer.busy:
            self.writer.commit()
        self.writer.close()
        if self.cache:
            self.cache.close()
        return {"progress": self.share.total, "steps": self.share.steps, "loss": loss, "quarantined": len(self.quarantine)}

    def resume(self) -> int:
        """Go on from the newest checkpoint that is whole on every rank; returns the step to go on with."""
        job = self.job
        box: list[Any] = [None]
        if self.place.rank == 0:
            self.superseded()
            checkpoint.remove_orphans(job.run, job.stage, Attempt(job.life, job.attempt))
            box = [candidates(job.run, job.stage, self.share, job.dataset, job.manifest, job.experiment)]
        dist.broadcast_object_list(box)
        found = restore(self.engine, self.quarantine, job.run, job.stage, box[0], _gather)
        if found is None:
            return 0
        if self.validator and found.progress < self.share.total and not self.validated(found):
            self.validate(self.validator, found)  # the life that wrote it died before
        self.meter.gauges["progress_items"] = found.progress
        return found.steps

    def superseded(self) -> None:
        """Stop if a newer life or attempt has begun."""
        assert_newest_life(self.job.run, self.job.life, self.job.attempt)

    def fetch(self, batches: Iterator[Batch]) -> Batch | None:
        with self.meter.phase("data_wait"):
            return next(batches, None)

    def forward_backward(self, batch: Batch, valid: int) -> torch.Tensor:
        """The step's gradient; returns this rank's part of its mean loss."""
        torch.manual_seed(seed_of("dropout", self.job.experiment.seed, batch.step, self.place.rank) % 2**63)
        loss = torch.zeros((), device=self.place.device)
        for micro_batch in batch.split(self.engine.settings.micro_batches):
            on_device = {name: tensor.to(self.place.device, non_blocking=True) for name, tensor in micro_batch.items()}
            with self.meter.phase("forward"):
                part = self.engine.forward(on_device, valid)
            with self.meter.phase("backward"):
                self.engine.backward(part)
            loss += part.detach()
        return loss

    def agree(self, loss: torch.Tensor, batch: Batch | None, upcoming: Batch | None) -> Verdict:
        """The one small all-reduce: loss and ledger of this step, valid and corrupt items of the next, finished uploads."""
        valid, corrupt = (upcoming.valid, upcoming.corrupt) if upcoming else (0, ())
        mine = Verdict(float(loss), batch.ledger if batch else 0, valid, self.writer.uploaded, len(corrupt))
        verdict = mine.summed(self.place.device)
        if not np.isfinite(verdict.loss):
            assert batch is not None
            raise self.non_finite(batch, verdict.loss)
        if verdict.next_corrupt:
            self.isolate(corrupt)
        return verdict

    def non_finite(self, batch: Batch, loss: float) -> NonFinite:
        """What is said of a step whose loss is no number."""
        first, last = self.bounds(batch)
        items = self.order.at(np.arange(first, last)).tolist()
        return NonFinite(
            f"the loss of step {batch.step} of stage {self.job.stage} is {loss}; its items are {items} "
            f"(clip = item // 2, side = item % 2) of split {self.job.experiment.data.split} of {self.job.dataset.url}. "
            "Lower optim.lr, set optim.clip, or look at these clips"
        )

    def isolate(self, corrupt: tuple[BadItem, ...]) -> None:
        """Put what any rank found corrupt into every rank's quarantine."""
        for bad in self.quarantine.add(itertools.chain(*_gather(corrupt))):
            if self.place.rank == 0:
                log.error(
                    "QUARANTINED: item %d (clip %d, side %d of split %s) counts nothing from position %d on: %s",
                    *(bad.item, bad.item // 2, bad.item % 2, self.job.experiment.data.split, bad.position, bad.why),
                )

    def bounds(self, batch: Batch) -> tuple[int, int]:
        """Progress before and after a step."""
        return batch.step * self.share.batch, min((batch.step + 1) * self.share.batch, self.share.total)

    def update(self, batch: Batch, verdict: Verdict) -> None:
        """The optimiser's step, and what follows from the new progress: a row, a checkpoint."""
        before, after = self.bounds(batch)
        rate = learning_rate(self.optim, self.job.stage, before)
        with self.meter.phase("optimizer"):
            self.engine.step(rate)
        numbers = {"loss": verdict.loss, "gradient_norm": self.engine.gradient_norm, "learning_rate": rate}
        self.meter.gauges.update(progress_items=after, quarantined_items=len(self.quarantine), **numbers)
        logged = (batch.step + 1) % self.job.experiment.run.log_every == 0 or after == self.share.total
        if self.log is not None and logged:
            self.log.add(progress=after, step=batch.step, **numbers, ledger=int(verdict.ledger))
        all_uploaded, due = verdict.uploaded == self.place.ranks, self.checkpoint_due(before, after)
        if all_uploaded or due:
            with self.meter.phase("checkpoint"):
                committed = self.writer.commit() if self.writer.busy else None
                if due:
                    self.checkpoint(batch.step + 1, after)
            if committed and self.validator:
                self.validate(self.validator, committed)
        self.meter.gauges["peak_memory_bytes"] = peak_memory(self.place.device)
        items = len(batch.positions)
        self.meter.step_done(items=items, bytes=batch.bytes, flops=items * self.flops)

    def validated(self, found: Checkpoint) -> bool:
        """Whether the clips of validation were scored with this checkpoint."""
        name = validation_name(self.job.stage)
        return _gather(self.place.rank == 0 and any(row["progress"] == found.progress for row in read_rows(self.job.run, name)))[0]

    def validate(self, validator: Validator, found: Checkpoint) -> None:
        """Score a checkpoint on the clips of validation."""
        with self.meter.phase("evaluation"):
            scores = validator.validate(found)
        self.meter.gauges.update(val_progress_items=found.progress, val_frcorr=scores["FRCorr"], val_frdist=scores["FRDist"])
        if self.validation_log is not None:
            self.validation_log.add(progress=found.progress, **scores)
            self.validation_log.flush()

    def checkpoint_due(self, before: int, after: int) -> bool:
        """At every multiple of the cadence, at the end, and before a last step that is not a whole batch."""
        every = self.job.experiment.run.checkpoint_every[self.job.stage] or self.order.items
        ends = after == self.share.total or 0 < self.share.total - after < self.share.batch
        return ends or before // every != after // every

    def checkpoint(self, steps: int, progress: int) -> None:
        self.writer.begin(
            self.engine.fragments(),
            dict(self.engine.stage.named_buffers()),
            stage=self.job.stage,
            progress=progress,
            steps=steps,
            life=self.job.life,
            attempt=self.job.attempt,
            dataset=self.job.manifest,
            config=identity(self.job.experiment),
            quarantine=self.quarantine.entries,
        )
        if self.log is not None:
            self.log.flush()


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _reporting(meter: Meter, report: Callable[[Snapshot], None]) -> Iterator[None]:
    """Hand over a snapshot about once a second and at the end."""
    done = Event()

    def repeat() -> None:
        while not done.wait(1.0):
            report(meter.snapshot())

    thread = Thread(target=repeat, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        report(meter.snapshot())
