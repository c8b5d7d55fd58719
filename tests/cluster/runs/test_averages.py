"""Averages of another length out of the checkpoints of a stage: which of them count, and what is said where they do not suffice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config.schema import Experiment
from cluster.runs.averages import averaged_weights
from cluster.runs.checkpoint import Checkpoint, list_checkpoints, read_manifest
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention
from cluster.storage import Store
from cluster.training.engine import Fragment
from reactdiff.diffusion.averages import LENGTHS, average_kind, decay
from tests.tiny import tiny

STAGE, BATCH, STEPS = "diffusion", 4, 60
SETTINGS = ("optim.batch=4", "diffusion.ema_every=22", "run.keep=1", "model.online=true", "model.denoiser=transformer")
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
    every = experiment.ema_every(STAGE)
    for step in range(1, STEPS + 1):
        if step == STEPS or step in more or (step - 1) * BATCH // every != step * BATCH // every:
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
