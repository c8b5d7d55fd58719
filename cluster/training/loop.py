"""The training loop every rank runs. It needs torch.distributed and a store, not Ray."""

import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.config.identity import identity
from cluster.data.cache import Cache
from cluster.data.manifest import load_manifest
from cluster.data.other_targets import read_other_targets
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.reader import Reader
from cluster.data.stream import Batch, Share, Stream
from cluster.runs.averages import marks
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.inventory import remove_orphans
from cluster.runs.latents import corrupt_clips, read_moments, read_range
from cluster.runs.logs import log_folder, rank_log
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, assert_newest_life, poll_for_successor
from cluster.runtime.device import peak_flops, peak_memory
from cluster.runtime.nvml import card_gauges
from cluster.storage import StorageError
from cluster.storage.retry import store_faults
from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.metrics_log import MetricsLog
from cluster.training.agreement import Verdict, Word
from cluster.training.ahead import Ahead
from cluster.training.engine import Engine
from cluster.training.examine import Examiner
from cluster.training.job import Job, Place
from cluster.training.late_compiler import load_compiler_late
from cluster.training.looks import Looks, Stretches
from cluster.training.reporting import Inbox, reporting
from cluster.training.requests import Request
from cluster.training.resume import candidates, restore, tell_other_arithmetic
from cluster.training.settings import engine_settings
from cluster.training.stacks import stacks
from cluster.training.warm_start import first_weights
from reactdiff.data.keyed import seed_of
from reactdiff.data.order import Order
from reactdiff.determinism import make_deterministic
from reactdiff.learning_rate import learning_rate
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, build_without_memory, stage

log = logging.getLogger(__name__)


def train(job: Job, place: Place, report: Callable[[Snapshot], Request | None]) -> dict[str, Any]:
    """Train a stage from its newest whole checkpoint to its end; every rank of the group calls this.

    Args:
        job: what to do.
        place: this rank.
        report: takes this rank's cumulative numbers, about once a second, and returns what is asked of it.

    Returns:
        progress, steps, loss of the last step, how many items are quarantined, and whether the ranks left before the end.

    Raises:
        NonFinite, CorruptData, NoUsableCheckpoint, StorageError, Superseded: the run must not go on.
    """
    meter = Meter(place.rank, place.ranks, job.stage)
    meter.store_faults = store_faults
    make_deterministic(job.experiment.workers.threads, tf32=job.experiment.optim.precision == "tf32")
    load_compiler_late()
    log_key = f"{log_folder(job.life, job.attempt)}/{job.stage}-rank-{place.rank}.log"
    begins = f"rank {place.rank} of {place.ranks} on {platform.node()}, process {os.getpid()}"
    # It reports until its log is written: a rank that falls silent is taken for one that hangs.
    gauges = card_gauges(place.device)
    with reporting(meter, report, lambda: _write_stacks(job, place), gauges) as inbox, rank_log(job.run, log_key, place.ranks, begins):
        try:
            training = _Training(job, place, meter, inbox)
            with closing(training.stream):
                return training.run()
        finally:
            meter.end()


class _Training:
    def __init__(self, job: Job, place: Place, meter: Meter, inbox: Inbox):
        experiment, optim = job.experiment, job.experiment.optim
        self.job, self.place, self.meter, self.optim, self.inbox = job, place, meter, optim, inbox
        self.checkpointed = time.monotonic()
        manifest = load_manifest(job.dataset, job.manifest)
        data = experiment.data
        self.cache = Cache(Path(data.cache), int(1e9 * data.cache_limit)) if data.cache else None
        self.reader = Reader(job.dataset, manifest, data.split, self.cache)
        self.order = Order(2 * self.reader.counts, experiment.seed, data.block, data.group, data.order)
        total, batch = int(optim.epochs[job.stage] * self.order.items), optim.batch[job.stage]
        self.share, self.marks = Share(batch, total, place.ranks, place.rank), marks(experiment.ema_every(job.stage), batch, total)
        source = Source(manifest.stream_specs, manifest.frames)
        self.kind = kind = stage(job.stage, experiment.model, experiment.diffusion, source)
        meter.gauges["peak_flops"] = peak_flops(place.device, optim.precision)
        corrupt = corrupt_clips(manifest, data.split)
        self.quarantine = Quarantine(BadItem(2 * clip + side, 0, why) for clip, why in corrupt.items() for side in (0, 1))
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
            others=read_other_targets(experiment, job.clips, kind.targets(), corrupt),
        )
        module = build_without_memory(kind)
        weights = first_weights(kind, job.stage, experiment, log.warning if place.rank == 0 else log.debug)
        if isinstance(module, LatentDiffusion):
            module.set_range(*read_range(job.dataset, manifest), *(read_moments(job.dataset, manifest) if module.standardised else ()))
        self.ahead = Ahead(place.device)
        self.engine = Engine(module, weights, engine_settings(experiment, job.stage, place.ranks), place.device)
        self.writer = CheckpointWriter(job.run, _gather, place.rank, Retention.of(experiment, job.stage), self.superseded)
        self.successor = poll_for_successor(job.run, job.life) if place.rank == 0 else None
        self.log = MetricsLog(job.run, job.life, job.attempt, job.stage) if place.rank == 0 else None
        self.looks = Looks(job, place, kind, self.share, meter, _gather, self.on_cadence)
        self.examiner = Examiner(job, place, kind, self.reader, self.order, self.share, _gather)

    def run(self) -> dict[str, Any]:
        step, progress, loss, left = self.resume(), 0, float("nan"), False
        zero = torch.zeros((), device=self.place.device)
        self.writer.prepare(self.engine.fragments(), dict(self.engine.stage.named_buffers()))
        self.meter.begin()
        self.meter.gauges["checkpoint_time_seconds"] = time.time()
        batches = self.stream.batches(step)
        batch = self.fetch(batches)
        valid = int(self.heed(self.word(None, batch).summed(zero, zero), batch).of_all.next_valid)
        while batch is not None and not left:
            loss_part = self.forward_backward(batch, valid)
            upcoming = self.fetch(batches)
            verdict = self.step(batch, upcoming, loss_part)
            while not verdict.finite:
                verdict = self.repeat(batch, upcoming, verdict)
            self.ahead.drop(batch)
            progress, left = self.share.bounds(batch.step)[1], self.stepped(batch, verdict)
            step, batch, valid, loss = batch.step + 1, upcoming, int(verdict.of_all.next_valid), verdict.loss
        with self.meter.phase("checkpoint"):
            if self.writer.busy:
                self.writer.commit()
            self.writer.close()
        if self.cache:
            self.cache.close()
        done = {"progress": progress, "steps": step} if left else {"progress": self.share.total, "steps": self.share.steps}
        return {**done, "loss": loss, "quarantined": len(self.quarantine), "left": left}

    def resume(self) -> int:
        """Go on from the newest checkpoint that is whole on every rank; returns the step to go on with."""
        job = self.job
        box: list[Any] = [None]
        if self.place.rank == 0:
            self.superseded()
            remove_orphans(job.run, job.stage, Attempt(job.life, job.attempt))
            box = [candidates(job.run, job.stage, self.share, job.dataset, job.manifest, job.experiment)]
        dist.broadcast_object_list(box)
        found = restore(self.engine, self.quarantine, job.run, job.stage, box[0], _gather)
        if found is None:
            return 0
        if self.place.rank == 0:
            tell_other_arithmetic(job.run, found)
        if found.progress < self.share.total:
            with self.meter.phase("evaluation"):  # the life that wrote it may have died before
                self.looks.take(found, self.averages, self.engine.stage, new=False)
            self.looks.look()
        self.meter.gauges["progress_items"] = found.progress
        return found.steps

    def averages(self) -> Stretches:
        """What this rank holds of the averaged weights."""
        return [(one.name, one.start, one.tensors["average"]) for one in self.engine.fragments()]

    def superseded(self) -> None:
        """Stop if a newer life or attempt has begun."""
        assert_newest_life(self.job.run, self.job.life, self.job.attempt)

    def fetch(self, batches: Iterator[Batch]) -> Batch | None:
        with self.meter.phase("data_wait"):
            batch = next(batches, None)
        if batch is not None:
            self.ahead.copy(batch)
        return batch

    def forward_backward(self, batch: Batch, valid: int) -> torch.Tensor:
        """The step's gradient; returns this rank's part of its mean loss."""
        torch.manual_seed(self.dropout_seed(batch))
        loss = torch.zeros((), device=self.place.device)
        on_device = replace(batch, tensors=self.ahead.take(batch))
        for micro_batch in on_device.split(self.engine.settings.micro_batches):
            with self.meter.phase("forward"):
                part = self.engine.forward(micro_batch, valid)
            with self.meter.phase("backward"):
                self.engine.backward(part)
            loss += part.detach()
        return loss

    def step(self, batch: Batch, upcoming: Batch | None, loss: torch.Tensor) -> Verdict:
        """Agree on a step and apply it, or leave all as it was where it is not finite; the host reads at the end what was decided."""
        # On a CPU a rank waits for its peers in the all-reduce, on a GPU only where the sums are read.
        with self.meter.phase("agree" if self.place.device.type == "cpu" else "backward"):
            sums = self.word(batch, upcoming).summed(loss, self.engine.gradient_square())
        with self.meter.phase("optimizer"):
            self.engine.step(self.rate(batch), sums[0], sums[1])
        with self.meter.phase("agree"):
            return self.heed(sums, upcoming)

    def word(self, batch: Batch | None, upcoming: Batch | None) -> Word:
        """What this rank brings to the one small all-reduce."""
        asked = self.inbox.request
        return Word(
            ledger=batch.ledger if batch else 0,
            next_valid=upcoming.valid if upcoming else 0,
            uploaded=self.writer.uploaded,
            written=self.writer.written,
            next_corrupt=len(upcoming.corrupt) if upcoming else 0,
            checkpoint=self.checkpoint_overdue(),
            leave=asked == Request.LEAVE,
            leave_at_checkpoint=asked == Request.LEAVE_AT_CHECKPOINT,
        )

    def heed(self, sums: torch.Tensor, upcoming: Batch | None) -> Verdict:
        """Read what came of it; damaged items of the next step count nothing from here on."""
        verdict = Verdict.read(sums)
        if verdict.of_all.next_corrupt:
            self.isolate(itertools.chain(*_gather(upcoming.corrupt if upcoming else ())))
        return verdict

    def repeat(self, batch: Batch, upcoming: Batch | None, verdict: Verdict) -> Verdict:
        """Compute a step that was not finite once more, without the items that are to blame; they count nothing from here on.

        Raises:
            NonFinite: if none is to blame, or the run is to stop at bad items.
        """
        with self.meter.phase("evaluation"):  # item by item: it may take longer than a step
            module = self.engine.fill(self.kind.module().to(self.place.device))
            self.isolate(self.examiner.to_blame(module, batch, verdict, self.dropout_seed(batch)))
        for changed in filter(None, (batch, upcoming)):
            self.stream.mask(changed)
            self.ahead.copy(changed)
        return self.step(batch, upcoming, self.forward_backward(batch, sum(_gather(batch.valid))))

    def dropout_seed(self, batch: Batch) -> int:
        """Of this rank in a step, however often it is computed."""
        return seed_of("dropout", self.job.experiment.seed, batch.step, self.place.rank) % 2**63

    def isolate(self, found: Iterable[BadItem]) -> None:
        """Put what the ranks found, the same on all of them, into the quarantine."""
        for bad in self.quarantine.add(found):
            if self.place.rank == 0:
                log.error(
                    "QUARANTINED: item %d (clip %d, side %d of split %s) counts nothing from position %d on: %s",
                    *(bad.item, bad.item // 2, bad.item % 2, self.job.experiment.data.split, bad.position, bad.why),
                )

    def rate(self, batch: Batch) -> float:
        """The learning rate of a step."""
        return learning_rate(self.optim, self.job.stage, self.share.bounds(batch.step)[0])

    def stepped(self, batch: Batch, verdict: Verdict) -> bool:
        """What follows from a step that was applied: averaged weights, a row, a checkpoint; returns whether the ranks leave now."""
        (before, after), told = self.share.bounds(batch.step), verdict.of_all
        if self.successor and self.successor.answer():
            self.superseded()
        with self.meter.phase("optimizer"):
            self.engine.average(batch.step + 1)
        numbers = {"loss": verdict.loss, "gradient_norm": verdict.gradient_norm, "learning_rate": self.rate(batch)}
        self.meter.gauges.update(progress_items=after, quarantined_items=len(self.quarantine), **numbers)
        logged = (batch.step + 1) % self.job.experiment.run.log_every == 0 or after == self.share.total
        if self.log is not None and logged:
            self.log.add(progress=after, step=batch.step, **numbers, ledger=int(told.ledger))
        all_uploaded = told.uploaded == self.place.ranks
        due = self.on_cadence(before, after) or bool(self.looks.rungs(before, after) or told.checkpoint or told.leave)
        if all_uploaded or told.written or due:
            with self.meter.phase("checkpoint"):
                self.go_on_with_checkpoint(batch.step + 1, after, bool(told.written), due)
            self.looks.look()
        self.meter.gauges["peak_memory_bytes"] = peak_memory(self.place.device)
        items = len(batch.positions)
        self.meter.step_done(items=items, bytes=batch.bytes, flops=items * self.job.flops)
        return after < self.share.total and bool(told.leave or (due and told.leave_at_checkpoint))

    def go_on_with_checkpoint(self, steps: int, progress: int, written: bool, due: bool) -> None:
        """Publish, finish or begin a checkpoint."""
        if written or (due and self.writer.busy):  # where the next one is due already, it is waited for
            finished = self.writer.commit()
            self.meter.gauges["checkpoint_time_seconds"] = time.time()
            self.looks.take(finished, lambda: self.writer.begun("average"), self.engine.stage)  # before the next one overwrites them
        elif self.writer.busy:
            self.writer.publish()
        if due:
            self.checkpoint(steps, progress)

    def on_cadence(self, before: int, after: int) -> bool:
        """At every multiple of the cadence and of `diffusion.ema_every`, at the end, and before a last step that is not a whole batch."""
        experiment, stage = self.job.experiment, self.job.stage
        every = experiment.run.checkpoint_every[stage] or self.order.items
        ends = after == self.share.total or 0 < self.share.total - after < self.share.batch
        return ends or before // every != after // every or after in self.marks

    def checkpoint_overdue(self) -> bool:
        """Whether the last checkpoint is longer ago than `run.checkpoint_minutes`; rank 0's clock decides for all."""
        minutes = self.job.experiment.run.checkpoint_minutes
        overdue = self.place.rank == 0 and minutes > 0 and time.monotonic() - self.checkpointed >= 60 * minutes
        return overdue and not self.writer.busy

    def checkpoint(self, steps: int, progress: int) -> None:
        self.checkpointed = time.monotonic()
        self.writer.begin(
            self.engine.fragments(),
            dict(self.engine.stage.named_buffers()),
            write_rows=self.log.take() if self.log else None,
            stage=self.job.stage,
            progress=progress,
            steps=steps,
            life=self.job.life,
            attempt=self.job.attempt,
            dataset=self.job.manifest,
            config=identity(self.job.experiment),
            quarantine=self.quarantine.entries,
        )


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _write_stacks(job: Job, place: Place) -> None:
    with suppress(StorageError):  # who asks gives up waiting
        job.run.put(f"{log_folder(job.life, job.attempt)}/{job.stage}-stacks-{place.rank}.txt", stacks().encode())
