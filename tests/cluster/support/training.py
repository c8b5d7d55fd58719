"""Train one stage on gloo ranks without Ray, as the tests of the loop do."""

import logging
from pathlib import Path
from typing import Any

import torch

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.evaluation.validation import ValidationClips
from cluster.storage import open_store
from cluster.telemetry.metrics_log import read_rows
from cluster.training.job import Job, Place
from cluster.training.loop import train
from tests.cluster.support.ranks import on_ranks


def train_on(ranks: int, experiment: Experiment, folder: Path | str, life: int = 1, stage: str = "autoencoder") -> list[dict[str, Any]]:
    """Train a stage in this run folder to its end; returns the rows of its metrics."""
    on_ranks(ranks, train_here, experiment, str(folder), life, stage)
    return read_rows(open_store(str(folder)), stage)


def train_here(
    rank: int, ranks: int, experiment: Experiment, folder: str, life: int, stage: str, validation: ValidationClips | None = None
) -> dict[str, Any]:
    """What one rank does; what it logs goes to `<folder>.log`, since its stderr is the fork server's."""
    logging.getLogger("cluster").addHandler(logging.FileHandler(f"{folder}.log"))
    dataset = open_store(experiment.data.url)
    job = Job(experiment, stage, open_store(folder), life, dataset, load_manifest(dataset).hash, validation)
    return train(job, Place(rank, ranks, torch.device("cpu")), lambda snapshot: None)


def parts(folder: Path | str, stage: str = "autoencoder") -> list[str]:
    """Content hashes of the parts of the newest checkpoint: equal if and only if weights, moments and averages are bitwise equal."""
    from cluster.runs import checkpoint

    store = open_store(str(folder))
    return [part.hash for part in checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, stage)[0]).parts]
