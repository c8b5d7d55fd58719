"""What a worker group does, and a rank's place in it."""

from dataclasses import dataclass

import torch

from cluster.config.schema import Experiment
from cluster.evaluation.validation import ValidationClips
from cluster.storage import Store


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
