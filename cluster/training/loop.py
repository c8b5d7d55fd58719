"""The training loop every rank runs. It needs torch.distributed and a store, not Ray."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.config.loading import identity
from cluster.config.schema import Experiment
from cluster.data.cache import Cache
from cluster.data.manifest import load_manifest
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.reader import Reader
from cluster.data.stream import Batch, Share, Stream
from cluster.evaluation.validation import ValidationClips, Validator
from cluster.runs import checkpoint
from cluster.runs.checkpoint import Checkpoint, CheckpointWriter, DamagedCheckpoint
from cluster.runs.latents import corrupt_clips, read_range
from cluster.runs.state import assert_newest_life
from cluster.runtime.device import peak_flops, peak_memory
from cluster.runtime.failures import NonFinite
from cluster.storage import open_store
from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.metrics_log import MetricsLog, read_rows, validation_name
from cluster.training.engine import Engine, EngineSettings
from cluster.training.warm_start import warm_start
from reactdiff.data.keyed import seed_of
from reactdiff.data.order import Order
from reactdiff.determinism import make_deterministic
from reactdiff.learning_rate import learning_rate
from reactdiff.model.flops import training_flops
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, build, empty_batch, stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What one worker group does: train one stage of one run to the end.

    Attributes:
        experiment: the whole configuration.
        stage: "autoencoder" or "diffusion".
        folder: URL of the run.
        life: this start of the driver.
        dataset: URL of what the stage reads: clips or latents.
        manifest: hash of the dataset's state.
        watched: clips that are scored at each checkpoint.
        attempt: how often the worker group of this life was started before.
    """

    experiment: Experiment
    stage: str
    folder: str
    life: int
    dataset: str
    manifest: str
    watched: ValidationClips | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where it computes."""

    rank: int
    ranks: int
    device: torch.device


@dataclass(frozen=True)
class Verdict:
    """What all ranks know after the one small all-reduce of a step."""

    loss: float
    ledger: int
    next_valid: int
    all_uploaded: bool


def train(job: Job, place: Place, report: Callable[[Snapshot], None]) -> dict[str, Any]:
    """Train a stage from its newest whole checkpoint to its end; every rank of the group calls this.

    Args:
        job: what to do.
        place: this rank.
        report: takes this rank's cumulative numbers, about once a second.

    Returns:
        progress, steps, loss of the last step, and how many items are quarantined.

    Raises:
        NonFinite, CorruptData, StorageError, Superseded: the run must not go on.
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
        experiment, optim, workers = job.experiment, job.experiment.optim, job.experiment.workers
        self.job, self.place, self.meter, self.optim = job, place, meter, optim
        self.store = open_store(job.folder)
        manifest = load_manifest(open_store(job.dataset), job.manifest)
        data = experiment.data
        self.cache = Cache(Path(data.cache), int(1e9 * data.cache_limit)) if data.cache else None
        self.reader = Reader(open_store(job.dataset), manifest, data.split, self.cache)
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
            module.set_range(*read_range(open_store(job.dataset), manifest))
        self.micro_batches = micro_batches(batch, place.ranks, workers.micro_batch)
        settings = EngineSettings(
            workers.zero, optim.precision, self.micro_batches, optim.betas, optim.weight_decay, optim.clip, optim.ema[job.stage]
        )
        self.engine = Engine(module, settings, place.device)
        self.writer = CheckpointWriter(
            self.store, _gather, place.rank, experiment.run.keep, lambda: assert_newest_life(self.store, job.life)
        )
        self.history = MetricsLog(self.store, job.life, job.attempt, job.stage) if place.rank == 0 else None
        self.watch: Validator | None = None
        if job.watched:
            self.watch = Validator(experiment, job.watched, self.store, kind.module(), _gather, place.rank, place.ranks, place.device)
        self.seen = MetricsLog(self.store, job.life, job.attempt, validation_name(job.stage)) if place.rank == 0 and job.watched else None

    def run(self) -> dict[str, Any]:
        step, loss = self.resume(), float("nan")
        batches = self.stream.batches(step)
        batch = self.fetch(batches)
        valid = self.agree(torch.zeros(()), None, batch).next_valid
        while batch is not None:
            loss_part = self.forward_backward(batch, valid)
            upcoming = self.fetch(batches)
            with self.meter.phase("backward"):  # on a GPU, here the host waits for what it only queued
                verdict = self.agree(loss_part, batch, upcoming)
            self.update(batch, verdict)
            batch, valid, loss = upcoming, verdict.next_valid, verdict.loss
        if self.writer.busy:
            self.writer.commit()
        self.writer.close()
        if self.cache:
            self.cache.close()
        return {"progress": self.share.total, "steps": self.share.steps, "loss": loss, "quarantined": len(self.quarantine)}

    def resume(self) -> int:
        """Restore the newest checkpoint that is whole on every rank; returns the step to go on with."""
        if self.place.rank == 0:
            assert_newest_life(self.store, self.job.life)
            checkpoint.remove_orphans(self.store, self.job.stage)
        box: list[Any] = [self.candidates() if self.place.rank == 0 else None]
        dist.broadcast_object_list(box)
        extents = self.engine.extents()
        for found in box[0]:
            try:
                read, problem = checkpoint.reader(self.store, found, extents), ""
            except DamagedCheckpoint as error:
                problem = str(error)
            if problems := [text for text in _gather(problem) if text]:
                log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", problems[0])
                continue
            self.engine.restore(read, found.steps)
            self.quarantine.add(found.quarantine)
            if self.watch and found.progress < self.share.total and not self.looked_at(found):
                self.validate(self.watch, found)  # the life that wrote it died before
            self.meter.gauges["progress_items"] = found.progress
            return found.steps
        return 0

    def candidates(self) -> list[Checkpoint]:
        """The checkpoints this run may go on from, newest first.

        One after a last step that was not a whole batch belongs to a shorter run: the one before it is the one to go on from.
        """
        found = []
        for name in checkpoint.list_checkpoints(self.store, self.job.stage):
            try:
                manifest = checkpoint.read_manifest(self.store, name)
            except DamagedCheckpoint as error:
                log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", error)
                continue
            if manifest.dataset != self.job.manifest:
                raise ValueError(
                    f"{self.store.url}/{name} was trained on data {manifest.dataset}, but the run now reads {self.job.manifest} "
                    f"({self.job.dataset}): give other data a run of another name (run.name)"
                )
            if manifest.quarantine and self.job.experiment.data.on_corrupt == "stop":
                raise ValueError(
                    f"{self.store.url}/{name} has {len(manifest.quarantine)} items in quarantine, but data.on_corrupt=stop trains on all: "
                    "go on with data.on_corrupt=quarantine, or train on the mended data in a run of another name (run.name)"
                )
            whole_batches = manifest.progress < self.share.total and manifest.progress % self.share.batch == 0
            if whole_batches or manifest.progress == self.share.total:
                found.append(manifest)
        return found

    def fetch(self, batches: Iterator[Batch]) -> Batch | None:
        with self.meter.phase("data_wait"):
            return next(batches, None)

    def forward_backward(self, batch: Batch, valid: int) -> torch.Tensor:
        """The step's gradient; returns this rank's part of its mean loss."""
        torch.manual_seed(seed_of("dropout", self.job.experiment.seed, batch.step, self.place.rank) % 2**63)
        loss = torch.zeros((), device=self.place.device)
        for micro_batch in batch.split(self.micro_batches):
            on_device = {name: tensor.to(self.place.device, non_blocking=True) for name, tensor in micro_batch.items()}
            with self.meter.phase("forward"):
                part = self.engine.forward(on_device, valid)
            with self.meter.phase("backward"):
                self.engine.backward(part)
            loss += part.detach()
        return loss

    def agree(self, loss: torch.Tensor, batch: Batch | None, upcoming: Batch | None) -> Verdict:
        """The one small all-reduce: loss and ledger of this step, valid and corrupt items of the next, uploads that have landed."""
        valid, corrupt = (upcoming.valid, upcoming.corrupt) if upcoming else (0, ())
        mine = [float(loss), batch.ledger if batch else 0, valid, self.writer.uploaded, len(corrupt)]
        sums = torch.tensor(mine, dtype=torch.float64, device=self.place.device)  # sums of CRC32C stay exact below 2^53
        dist.all_reduce(sums)
        total = sums.tolist()
        if not np.isfinite(total[0]):
            assert batch is not None
            first, last = batch.step * self.share.batch, min((batch.step + 1) * self.share.batch, self.share.total)
            items = self.order.at(np.arange(first, last)).tolist()
            raise NonFinite(
                f"the loss of step {batch.step} of stage {self.job.stage} is {total[0]}; its items are {items} "
                f"(clip = item // 2, side = item % 2) of split {self.job.experiment.data.split} of {self.job.dataset}. "
                "Lower optim.lr, set optim.clip, or look at these clips"
            )
        if total[4]:
            self.isolate(corrupt)
        return Verdict(total[0], int(total[1]), int(total[2]), total[3] == self.place.ranks)

    def isolate(self, corrupt: tuple[BadItem, ...]) -> None:
        """Put what any rank found corrupt into every rank's quarantine."""
        for bad in self.quarantine.add(itertools.chain(*_gather(corrupt))):
            if self.place.rank == 0:
                log.error(
                    "QUARANTINED: item %d (clip %d, side %d of split %s) counts nothing from position %d on: %s",
                    *(bad.item, bad.item // 2, bad.item % 2, self.job.experiment.data.split, bad.position, bad.why),
                )

    def update(self, batch: Batch, verdict: Verdict) -> None:
        """The optimiser's step, and what follows from the new progress: a row, a checkpoint."""
        before, after = batch.step * self.share.batch, min((batch.step + 1) * self.share.batch, self.share.total)
        rate = learning_rate(self.optim, self.job.stage, before)
        with self.meter.phase("optimizer"):
            self.engine.step(rate)
        norm = self.engine.gradient_norm
        gauges = {"loss": verdict.loss, "gradient_norm": norm, "learning_rate": rate, "quarantined_items": len(self.quarantine)}
        self.meter.gauges.update(progress_items=after, **gauges)
        logged = (batch.step + 1) % self.job.experiment.run.log_every == 0 or after == self.share.total
        if self.history is not None and logged:
            row = {"loss": verdict.loss, "gradient_norm": norm, "learning_rate": rate, "ledger": verdict.ledger}
            self.history.add(progress=after, step=batch.step, **row)
        due = self.checkpoint_due(before, after)
        if verdict.all_uploaded or due:
            with self.meter.phase("checkpoint"):
                committed = self.writer.commit() if self.writer.busy else None
                if due:
                    self.checkpoint(batch.step + 1, after)
            if committed and self.watch:
                self.validate(self.watch, committed)
        self.meter.gauges["peak_memory_bytes"] = peak_memory(self.place.device)
        items = len(batch.positions)
        self.meter.step_done(items=items, bytes=batch.bytes, flops=items * self.flops)

    def looked_at(self, found: Checkpoint) -> bool:
        """Whether the watched clips were scored with this checkpoint."""
        name = validation_name(self.job.stage)
        return _gather(self.place.rank == 0 and any(row["progress"] == found.progress for row in read_rows(self.store, name)))[0]

    def validate(self, watch: Validator, found: Checkpoint) -> None:
        """Score a checkpoint on the watched clips."""
        with self.meter.phase("evaluation"):
            scores = watch.validate(found)
        self.meter.gauges.update(val_progress_items=found.progress, val_frcorr=scores["FRCorr"], val_frdist=scores["FRDist"])
        if self.seen is not None:
            self.seen.add(progress=found.progress, **scores)
            self.seen.flush()

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
            dataset=self.job.manifest,
            config=identity(self.job.experiment),
            quarantine=self.quarantine.entries,
        )
        if self.history is not None:
            self.history.flush()


def micro_batches(batch: int, ranks: int, largest: int) -> int:
    """Forward passes of one step on each rank: the rank's largest share over the largest micro-batch."""
    share = -(-batch // ranks)
    return -(-share // largest) if largest else 1


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
