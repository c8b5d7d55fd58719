"""Averaged weights of any length, made of the two averages that checkpoints of a stage hold (`diffusion.ema_every`)."""

from math import prod

import torch

from cluster.config.schema import Experiment
from cluster.runs.checkpoint import Checkpoint, GoneCheckpoint, Target, list_checkpoints, load_into, progress_of, read_manifest
from cluster.storage import Store
from reactdiff.diffusion.averages import LENGTHS, Profile, average_kind, mixture

WORST = 0.2
"""Misfit from which on a mixture is not given out as the average that was asked for."""


def marks(every: int, batch: int, progress: int) -> set[int]:
    """The progress of each checkpoint that a stage keeps for averages, until it ends at this progress."""
    return {min(-(-mark // batch) * batch, progress) for mark in range(every, progress + 1, every)} if every else set()


def averaged_weights(store: Store, experiment: Experiment, found: Checkpoint, length: float) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint as an average of this relative length, in the model's shapes, and its buffers.

    They are a function of the configuration and of the checkpoints at the multiples of `diffusion.ema_every` alone: of those that a
    clock or a notice asked for only `found` itself may be among them.

    Args:
        store: the run's folder.
        experiment: its configuration.
        found: the checkpoint at whose end the average is taken.
        length: above 0.

    Raises:
        ValueError: if checkpoints that are needed are gone, or the length is too far from what they allow.
        DamagedCheckpoint: as `load_into`.
    """
    every, batch = experiment.ema_every(found.stage), experiment.optim.batch[found.stage]
    if not every:
        raise ValueError(f"{store.url} keeps no averages of stage {found.stage} for other lengths: diffusion.ema_every of the run is 0")
    wanted = marks(every, batch, found.progress) - {found.progress}
    there = [*_at(store, found.stage, wanted), found]
    basis = [(one, kept) for one in there for kept in LENGTHS]
    mixed = mixture([Profile(one.steps, kept) for one, kept in basis], Profile(found.steps, length))
    if mixed.misfit > WORST:
        raise ValueError(
            f"an average of length {length:g} cannot be made of the {len(there)} checkpoints of stage {found.stage} in {store.url}: the "
            f"nearest one differs by {mixed.misfit:.0%} of its profile. Ask for a length nearer to {' or '.join(map(str, LENGTHS))}; "
            f"with a smaller diffusion.ema_every (it is {every}) a new run keeps more"
        )
    whole = {name: torch.zeros(prod(shape), dtype=torch.float64) for name, shape in found.shapes.items()}
    for number, one in enumerate(there):
        kinds = dict(zip(map(average_kind, LENGTHS), mixed.weights[number * len(LENGTHS) :], strict=False))
        part = {name: {kind: torch.empty(flat.numel()) for kind in kinds} for name, flat in whole.items()}
        buffers = load_into(store, one, [Target(name, 0, views) for name, views in part.items()])
        for name, views in part.items():
            for kind, weight in kinds.items():
                whole[name].add_(views[kind], alpha=weight)
    return {name: flat.float().view(*found.shapes[name]) for name, flat in whole.items()} | buffers


def _at(store: Store, stage: str, wanted: set[int]) -> list[Checkpoint]:
    """The checkpoints at these amounts of progress, in their order."""
    there: dict[int, Checkpoint] = {}
    for key in list_checkpoints(store, stage):
        if (progress := progress_of(key)) in wanted and progress not in there:
            try:
                there[progress] = read_manifest(store, key)
            except GoneCheckpoint:
                continue
    if missing := sorted(wanted - there.keys()):
        raise ValueError(
            f"{store.url}/checkpoints/{stage} has no checkpoint at progress {', '.join(map(str, missing))} any more, which an average of "
            "another length needs: restore it from a copy, or ask without diffusion.ema_length"
        )
    return [there[progress] for progress in sorted(there)]
