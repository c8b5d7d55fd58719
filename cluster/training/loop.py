"""The training loop every rank runs. It needs torch.distributed and a store, not Ray."""

import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.config.identity import identity
from cluster.config.schema import Experiment
from cluster.data.cache import Cache
from cluster.data.manifest import load_manifest
from cluster.data.others import read_others
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.reader import Reader
from cluster.data.stream import Batch, Share, Stream
from cluster.evaluation.rung import RungMeter, read_rung, write_rung
from cluster.evaluation.validation import ValidationClips, Validator
from cluster.runs.averages import marks
from cluster.runs.checkpoint import Checkpoint
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.inventory import remove_orphans
from cluster.runs.latents import corrupt_clips, read_moments, read_range
from cluster.runs.logs import log_folder, rank_log
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, assert_newest_life, lookout_for_successor
from cluster.runtime.device import peak_flops, peak_memory
from cluster.runtime.nvml import card_gauges
from cluster.storage import StorageError, Store
from cluster.storage.retry import store_faults
from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.metrics_log import MetricsLog, read_rows, validation_name
from cluster.training.ahead import Ahead
from cluster.training.compiler import load_compiler_late
from cluster.training.engine import LARGEST_NORM, Engine, NonFinite, engine_settings
from cluster.training.examine import examine
from cluster.training.reporting import Inbox, reporting
from cluster.training.requests import Request
from cluster.training.resume import candidates, restore, tell_other_arithmetic
from cluster.training.spread import spread
from cluster.training.stacks import stacks
from cluster.training.verdict import Verdict, Word
from cluster.training.warm_start import first_weights
from reactdiff.data.keyed import seed_of
from reactdiff.data.order import Order
from reactdiff.determinism import make_deterministic
from reactdiff.learning_rate import learning_rate
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, build_without_memory, empty_batch, stage

log = logging.getLogger(__name__)


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
        validation: clips that are scored at each checkpoint and measured at rungs.
        attempt: how often a worker group of this life was started before, for this stage or an earlier one.
        flops: floating point operations of forward and backward for one item, for telemetry; counted once, by the driver.
        clips: the dataset, and the hash of its state, that says whose reactions are appropriate for whom.
    """

    experiment: Experiment
    stage: str
    run: Store
    life: int
    dataset: Store
    manifest: str
    validation: ValidationClips | None = None
    attempt: int = 0
    flops: float = 0.0
    clips: tuple[Store, str] | None = None


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where it computes."""

    rank: int
    ranks: int
    device: torch.device


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
            others=read_others(experiment, job.clips, kind.targets(), corrupt),
        )
        module = build_without_memory(kind)
        weights = first_weights(kind, job.stage, experiment, log.warning if place.rank == 0 else log.debug)
        if isinstance(module, LatentDiffusion):
            module.set_range(*read_range(job.dataset, manifest), *(read_moments(job.dataset, manifest) if module.standardised else ()))
        self.ahead = Ahead(place.device)
        self.engine = Engine(module, weights, engine_settings(experiment, job.stage, place.ranks), place.device)
        self.writer = CheckpointWriter(job.run, _gather, place.rank, Retention.of(experiment, job.stage), self.superseded)
        self.successor = lookout_for_successor(job.run, job.life) if place.rank == 0 else None
        self.log = MetricsLog(job.run, job.life, job.attempt, job.stage) if place.rank == 0 else None
        self.validator: Validator | None = None
        self.rung_meter: RungMeter | None = None
        self.looked_at = kind.module() if job.validation else None
        if job.validation and self.looked_at:
            ours = _gather, place.rank, place.ranks, place.device
            if experiment.evaluation.watch:
                self.validator = Validator(experiment, job.validation, self.looked_at, *ours)
            if experiment.evaluation.rungs and isinstance(self.looked_at, LatentDiffusion):
                self.rung_meter = RungMeter(job.validation, experiment.evaluation.rung_clips, self.looked_at, *ours)
        validates = place.rank == 0 and self.validator
        self.validation_log = MetricsLog(job.run, job.life, job.attempt, validation_name(job.stage)) if validates else None

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
            progress, left = self.bounds(batch)[1], self.stepped(batch, verdict)
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
        with self.meter.phase("evaluation"):
            validates = self.validator and self.looks_at(found) and not self.validated(found)
            measures = self.rungs_at(found)
        if found.progress < self.share.total and (validates or measures):
            # The life that wrote it died before.
            self.take_averages([(one.name, one.start, one.tensors["average"]) for one in self.engine.fragments()])
            if validates:
                self.validate(found)
            self.measure(found)
        self.meter.gauges["progress_items"] = found.progress
        return found.steps

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
            self.isolate(self.to_blame(batch, verdict))
        for changed in filter(None, (batch, upcoming)):
            self.stream.mask(changed)
            self.ahead.copy(changed)
        return self.step(batch, upcoming, self.forward_backward(batch, sum(_gather(batch.valid))))

    def to_blame(self, batch: Batch, verdict: Verdict) -> list[BadItem]:
        """The items of a step that are not finite by themselves, the same on every rank.

        Where items of zeros, or all of the step's, are not finite either, it is the weights: to quarantine what such weights
        cannot take would go on until no data are left.

        Raises:
            NonFinite: if there are none, or the run is to stop at them.
        """
        valid, seed, device = sum(_gather(batch.valid)), self.dropout_seed(batch), self.place.device
        module = self.engine.fill(self.kind.module().to(device))
        wrong = examine(module, {name: tensor.to(device) for name, tensor in batch.tensors.items()}, valid, seed)
        mine = []
        for row, why in wrong.items():
            item = self.item_to_blame(batch, row)
            mine.append(BadItem(item, batch.positions[row], f"{self.reader.named(item // 2)}: {why} in step {batch.step}"))
        zeros = empty_batch(self.kind, 1, str(device)) | {"weight": torch.ones(1)}
        found, zeros_wrong = zip(*_gather((mine, examine(module, zeros, 1, seed))), strict=True)
        bad = sorted(itertools.chain(*found), key=lambda bad: bad.position)
        if any(zeros_wrong) or len(bad) == valid > 1:
            raise self.non_finite(batch, verdict, "no single item is to blame: with the weights of now, none is finite alone")
        if not bad:
            raise self.non_finite(batch, verdict, "no single item is to blame: each has a finite loss and gradient alone")
        if self.job.experiment.data.on_corrupt == "stop":
            raise self.non_finite(batch, verdict, "", bad)
        return bad

    def item_to_blame(self, batch: Batch, row: int) -> int:
        """The item of a row that is not finite; where its target is another's and holds what is no number, that one."""
        finite = all(batch.tensors[name][row].isfinite().all() for name in self.kind.targets())
        return batch.items[row] if finite else batch.targets[row]

    def non_finite(self, batch: Batch, verdict: Verdict, why: str, bad: Sequence[BadItem] = ()) -> NonFinite:
        """What is said of a step that cannot be applied."""
        data = f"split {self.job.experiment.data.split} of {self.job.dataset.url}"
        items = self.order.at(np.arange(*self.bounds(batch))).tolist()
        blame = "; ".join(f"item {one.item} (clip {one.item // 2}, side {one.item % 2} of {data}; {one.why})" for one in bad)
        return NonFinite(
            f"step {batch.step} of stage {self.job.stage} was not applied: its loss is {verdict.loss}, the norm of its gradient "
            f"{verdict.gradient_norm} (at most {LARGEST_NORM:g} can be). "
            + (
                f"To blame is {blame}. Mend the data, or go on without with data.on_corrupt=quarantine"
                if blame
                else f"Of its items {items} (clip = item // 2, side = item % 2) of {data}, {why}. "
                "Lower optim.lr or set optim.clip, in a run of another name (run.name)"
            ),
            [one.item for one in bad],
        )

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

    def bounds(self, batch: Batch) -> tuple[int, int]:
        """Progress before and after a step."""
        return batch.step * self.share.batch, min((batch.step + 1) * self.share.batch, self.share.total)

    def rate(self, batch: Batch) -> float:
        """The learning rate of a step."""
        return learning_rate(self.optim, self.job.stage, self.bounds(batch)[0])

    def stepped(self, batch: Batch, verdict: Verdict) -> bool:
        """What follows from a step that was applied: averaged weights, a row, a checkpoint; returns whether the ranks leave now."""
        (before, after), told = self.bounds(batch), verdict.of_all
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
        due = self.checkpoint_due(before, after) or bool(self.rungs_within(before, after) or told.checkpoint or told.leave)
        if all_uploaded or told.written or due:
            with self.meter.phase("checkpoint"):
                committed = self.go_on_with_checkpoint(batch.step + 1, after, bool(told.written), due)
            if committed and self.validator and self.looks_at(committed):
                self.validate(committed)
            if committed:
                self.measure(committed)
        self.meter.gauges["peak_memory_bytes"] = peak_memory(self.place.device)
        items = len(batch.positions)
        self.meter.step_done(items=items, bytes=batch.bytes, flops=items * self.job.flops)
        return after < self.share.total and bool(told.leave or (due and told.leave_at_checkpoint))

    def go_on_with_checkpoint(self, steps: int, progress: int, written: bool, due: bool) -> Checkpoint | None:
        """Publish, finish or begin a checkpoint; returns one that was finished."""
        finished = None
        if written or (due and self.writer.busy):  # where the next one is due already, it is waited for
            finished = self.writer.commit()
            self.meter.gauges["checkpoint_time_seconds"] = time.time()
            if (self.validator and self.looks_at(finished)) or self.rungs_at(finished):
                self.take_averages(self.writer.begun("average"))  # before the next one overwrites them
        elif self.writer.busy:
            self.writer.publish()
        if due:
            self.checkpoint(steps, progress)
        return finished

    def take_averages(self, stretches: list[tuple[str, int, torch.Tensor]]) -> None:
        """Give the copy that is looked at the averaged weights that ranks have in memory: those of a checkpoint."""
        assert self.looked_at
        spread(stretches, self.looked_at, _gather)
        for name, buffer in self.engine.stage.named_buffers():
            self.looked_at.get_buffer(name).copy_(buffer)

    def looks_at(self, found: Checkpoint) -> bool:
        """Whether clips of validation are scored with a checkpoint: those that a clock or a fault asked for are not looked at."""
        return self.checkpoint_due(found.progress - self.share.batch, found.progress)

    def validated(self, found: Checkpoint) -> bool:
        """Whether the clips of validation were scored with this checkpoint."""
        name = validation_name(self.job.stage)
        return _gather(self.place.rank == 0 and any(row["progress"] == found.progress for row in read_rows(self.job.run, name)))[0]

    def validate(self, found: Checkpoint) -> None:
        """Score a checkpoint on the clips of validation."""
        assert self.validator
        with self.meter.phase("evaluation"):
            scores = self.validator.validate()
            self.meter.gauges.update(val_progress_items=found.progress, val_frcorr=scores["FRCorr"], val_frdist=scores["FRDist"])
            if self.validation_log is not None:
                self.validation_log.add(progress=found.progress, **scores)
                self.validation_log.flush()

    def rungs_within(self, before: int, after: int) -> list[int]:
        """The rungs that a step reaches."""
        return [rung for rung in self.job.experiment.evaluation.rungs if before < rung <= after] if self.rung_meter else []

    def rungs_at(self, found: Checkpoint) -> list[int]:
        """The rungs at which this checkpoint is to be measured, and was not."""
        reached = self.rungs_within(found.progress - self.share.batch, found.progress)
        clips = self.job.experiment.evaluation.rung_clips
        return [rung for rung in reached if _gather(self.place.rank == 0 and read_rung(self.job.run, rung, clips) is None)[0]]

    def measure(self, found: Checkpoint) -> None:
        """Measure a checkpoint, if it is one of a rung."""
        with self.meter.phase("evaluation"):  # the store is asked, too, and may be slow
            for rung in self.rungs_at(found):
                assert self.rung_meter
                measured = self.rung_meter.measure()
                if self.place.rank == 0:
                    write_rung(self.job.run, rung, self.job.experiment.evaluation.rung_clips, found.progress, measured)

    def checkpoint_due(self, before: int, after: int) -> bool:
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


def _write_stacks(job: Job, place: Place) -> None:
    with suppress(StorageError):  # who asks gives up waiting
        job.run.put(f"{log_folder(job.life, job.attempt)}/{job.stage}-stacks-{place.rank}.txt", stacks().encode())
