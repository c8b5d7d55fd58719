"""Averages of another length out of the checkpoints of a stage: which of them count, what is exported, and what is refused."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config.schema import Experiment
from cluster.runs.averages import averaged_weights, marks
from cluster.runs.checkpoint import Checkpoint, assemble, list_checkpoints, read_manifest
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.export import (
    Export,
    export_earlier,
    load_export,
    load_weights,
    newest_export,
    weaker_export,
    with_length,
    write_export,
)
from cluster.runs.retention import Retention
from cluster.storage import NotFound, Store
from cluster.training.engine import Fragment
from reactdiff.averages import LENGTHS, average_kind, decay
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import Source, build, stages_over
from tests.tiny import tiny

STAGE, BATCH, STEPS = "diffusion", 4, 60
SMALL = ("model.online=true", "model.denoiser=transformer", "model.width=16", "model.layers=2")
SETTINGS = ("optim.batch=4", "diffusion.ema_every=22", "run.keep=1", *SMALL)
"""A mark every 22 items lies within a step of 4 as often as at its end."""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return tiny(tmp_path, tmp_path, *SETTINGS)


def path() -> np.ndarray:
    return np.cumsum(np.random.default_rng(1).normal(size=(STEPS, 2, 3)), axis=0)


def followed(length: float, until: int) -> np.ndarray:
    average = np.zeros((2, 3))
    for step, weights in enumerate(path()[:until], 1):
        average += (1 - decay(length, step)) * (weights - average)
    return average


def train(store: Store, experiment: Experiment, attempt: int = 0, more: tuple[int, ...] = ()) -> Checkpoint:
    """Checkpoints as training makes them: at each mark, where something else asks for one, and at the end; returns the last."""
    writer = CheckpointWriter(store, lambda value: [value], 0, Retention.of(experiment, STAGE), lambda: None)
    kept = marks(experiment.ema_every(STAGE), BATCH, STEPS * BATCH)
    for step in range(1, STEPS + 1):
        if step == STEPS or step in more or step * BATCH in kept:
            tensors = {average_kind(length): torch.tensor(followed(length, step), dtype=torch.float32).flatten() for length in LENGTHS}
            fragment = Fragment("layer.weight", (2, 3), 0, {"master": torch.zeros(6), **tensors})
            facts = {"stage": STAGE, "dataset": "", "config": {}, "life": 1, "attempt": attempt}
            writer.begin([fragment], {"scale": torch.tensor(2.0)}, progress=step * BATCH, steps=step, **facts)
            writer.commit()
            writer._cleaning.result()
    writer.close()
    return read_manifest(store, list_checkpoints(store, STAGE)[0])


def test_an_average_of_another_length_is_made_of_the_marks_alone(store: Store, experiment: Experiment) -> None:
    last = train(store, experiment)
    found = averaged_weights(store, experiment, last, 0.15)
    wanted, nearest = followed(0.15, STEPS), followed(0.10, STEPS)
    assert found["layer.weight"].shape == (2, 3) and float(found["scale"]) == 2
    assert np.linalg.norm(found["layer.weight"].numpy() - wanted) < 0.1 * np.linalg.norm(nearest - wanted)
    again = store.at("again")
    last = train(again, experiment, more=(3, 8, 29, 59))
    assert torch.equal(averaged_weights(again, experiment, last, 0.15)["layer.weight"], found["layer.weight"]), "a clock changes no weight"


def test_what_cannot_be_made_is_refused_with_the_reason(store: Store, experiment: Experiment) -> None:
    last = train(store, experiment)
    with pytest.raises(ValueError, match=r"ema_length=0\.01: .* of the 11 .*differs by \d\d% .*to 0\.05 or 0\.1, .* than 22"):
        averaged_weights(store, experiment, last, 0.01)
    gone = next(key for key in list_checkpoints(store, STAGE) if f"{112:015d}" in key)
    store.delete(gone)
    with pytest.raises(ValueError, match=r"no checkpoint at progress 112 any more.*ask without diffusion\.ema_length"):
        averaged_weights(store, experiment, last, 0.07)
    plain = experiment.model_copy(update={"diffusion": experiment.diffusion.model_copy(update={"ema_every": 0})})
    with pytest.raises(ValueError, match=r"keeps no averages of stage diffusion for other lengths: diffusion\.ema_every of the run is 0"):
        averaged_weights(store, plain, last, 0.07)


@dataclass
class Stage2:
    """A small stage 2 with checkpoints at its marks, whose averages drift."""

    store: Store
    experiment: Experiment
    source: Source

    def export(self, **diffusion: object) -> Export:
        """What the end of the stage leaves, under other settings of sampling."""
        changed = self.experiment.diffusion.model_copy(update=diffusion)
        return write_export(self.store, self.experiment.model_copy(update={"diffusion": changed}), STAGE, self.source, STEPS * BATCH)


@pytest.fixture
def stage2(store: Store, experiment: Experiment) -> Stage2:
    clips = Source((StreamSpec("au", "facial", 15), StreamSpec("mfcc", "acoustic", 26)), 100)
    experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"facial": ("au",)})})
    kind = stages_over(clips, experiment.model, experiment.diffusion)[STAGE]
    module, random = build(kind, 0), torch.Generator().manual_seed(0)
    writer = CheckpointWriter(store, lambda value: [value], 0, Retention.of(experiment, STAGE), lambda: None)
    kinds = ["average", *map(average_kind, LENGTHS)]
    flat = {name: parameter.detach().flatten() for name, parameter in module.named_parameters()}
    for progress in sorted(marks(experiment.ema_every(STAGE), BATCH, STEPS * BATCH) | {STEPS * BATCH}):
        fragments = []
        for name, parameter in module.named_parameters():
            tensors = {kind: flat[name] + 1e-3 * progress * torch.randn(flat[name].shape, generator=random) for kind in kinds}
            fragments.append(Fragment(name, tuple(parameter.shape), 0, {"master": flat[name], **tensors}))
        facts = {"stage": STAGE, "dataset": "", "config": {}, "life": 1, "attempt": 0}
        writer.begin(fragments, dict(module.named_buffers()), progress=progress, steps=progress // BATCH, **facts)
        writer.commit()
        writer._cleaning.result()
    writer.close()
    return Stage2(store, experiment, kind.source)


def test_a_length_is_made_once_and_then_read_by_whoever_asks(stage2: Stage2) -> None:
    store, experiment, export = stage2.store, stage2.experiment, stage2.export()
    last = read_manifest(store, list_checkpoints(store, STAGE)[0])
    assert all(torch.equal(one, assemble(store, last, "average")[name]) for name, one in load_weights(store, export).items())
    asked = with_length(store, experiment, export, 0.15)
    wanted = averaged_weights(store, experiment, last, 0.15)
    assert all(torch.equal(one, wanted[name]) for name, one in load_weights(store, asked).items())
    assert asked.hash != export.hash and asked.diffusion == export.diffusion | {"ema_length": 0.15}
    before = {entry.key for entry in store.list("")}
    for key in list_checkpoints(store, STAGE):
        store.delete(key)
    assert with_length(store, experiment, export, 0.15) == asked and {entry.key for entry in store.list("")} < before
    load_export(store, asked)
    assert newest_export(store, STAGE) == export, "what was asked for is no newer export"


def test_the_end_of_a_stage_is_exported_with_the_length_that_the_run_names(stage2: Stage2) -> None:
    named = stage2.export(ema_length=0.15)
    assert named.hash == with_length(stage2.store, stage2.experiment, named, 0.15).hash
    assert with_length(stage2.store, stage2.experiment, named, 0).hash != named.hash


def test_a_mark_guides_and_nothing_else_and_is_no_newer_export(stage2: Stage2) -> None:
    store, experiment, export = stage2.store, stage2.experiment, stage2.export()
    for progress in (111, STEPS * BATCH, STEPS * BATCH + 8, 112):
        asked = replace(export, diffusion=export.diffusion | {"autoguidance": 2.0, "weak_progress": progress, "sampler": "dpm++"})
        export_earlier(store, experiment, asked)
        if progress != 112:
            with pytest.raises(NotFound, match=f"weak_progress is {progress}, but .* earlier ones are: none"):
                weaker_export(store, asked)
    weak = weaker_export(store, asked)
    assert weak is not None and weak.progress == 112 and weak.diffusion == export.diffusion, "by itself it is guided by nothing"
    found = next(read_manifest(store, key) for key in list_checkpoints(store, STAGE) if f"{112:015d}" in key)
    assert all(torch.equal(one, assemble(store, found, "average")[name]) for name, one in load_weights(store, weak).items())
    assert newest_export(store, STAGE) == export


def test_a_mark_that_is_too_early_for_averages_as_long_as_the_run_s_is_named(stage2: Stage2) -> None:
    long = stage2.experiment.diffusion.model_copy(update={"ema_length": 0.25})
    experiment = stage2.experiment.model_copy(update={"diffusion": long})
    first = min(marks(experiment.ema_every(STAGE), BATCH, STEPS * BATCH))
    export = stage2.export(ema_length=0.25)
    asked = replace(export, diffusion=export.diffusion | {"autoguidance": 2.0, "weak_progress": first})
    with pytest.raises(ValueError, match=rf"weak_progress is {first}, too early for averages as long .* ask for a later one"):
        export_earlier(stage2.store, experiment, asked)
