"""Averaged weights of any length, made of the two averages that checkpoints of a stage hold (`diffusion.ema_every`)."""

from collections.abc import Set
from math import prod

import torch

from cluster.config.schema import Experiment
from cluster.runs.checkpoint import Checkpoint, GoneCheckpoint, Target, list_checkpoints, load_into, progress_of, read_manifest
from cluster.storage import Store
from reactdiff.averages import LENGTHS, Profile, average_kind, mixture

WORST = 0.2
"""Misfit from which on a mixture is not given out as the average that was asked for."""


def marks(every: int, batch: int, progress: int) -> set[int]:
    """The progress of each checkpoint that a stage keeps for averages until it is at this progress: of steps that reach a multiple."""
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
    if not experiment.ema_every(found.stage):
        raise ValueError(f"{store.url} keeps no averages of stage {found.stage} for other lengths: diffusion.ema_every of the run is 0")
    mixed = mixture_at(experiment, found.stage, found.progress, length)
    there = [*_at(store, found.stage, mixed.keys() - {found.progress}), found]
    whole = {name: torch.zeros(prod(shape), dtype=torch.float64) for name, shape in found.shapes.items()}
    part = {name: {average_kind(kept): torch.empty(flat.numel()) for kept in LENGTHS} for name, flat in whole.items()}
    for one in there:
        buffers = load_into(store, one, [Target(name, 0, views) for name, views in part.items()])
        for kept, weight in zip(LENGTHS, mixed[one.progress], strict=True):
            for name, views in part.items():
                whole[name].add_(views[average_kind(kept)], alpha=weight)
    for name, shape in found.shapes.items():
        part[name] = {"": whole.pop(name).float().view(*shape)}
    return {name: views[""] for name, views in part.items()} | buffers


def mixture_at(experiment: Experiment, stage: str, progress: int, length: float) -> dict[int, tuple[float, ...]]:
    """Which averages make one of this length at this progress: progress of a checkpoint -> the weight of each of its `LENGTHS`.

    Raises:
        ValueError: if the length is too far from what the checkpoints at the multiples of `diffusion.ema_every` allow.
    """
    every, batch = experiment.ema_every(stage), experiment.optim.batch[stage]
    there = sorted(marks(every, batch, progress) | {progress})
    steps = {one: -(-one // batch) for one in there}
    mixed = mixture([Profile(steps[one], kept) for one in there for kept in LENGTHS], Profile(steps[progress], length))
    if mixed.misfit > WORST:
        raise ValueError(
            f"diffusion.ema_length={length:g}: such an average cannot be made of the {len(there)} checkpoints that stage {stage} keeps "
            f"until {progress}: the nearest one differs by {mixed.misfit:.0%} of its profile. Ask for a length nearer to "
            f"{' or '.join(map(str, LENGTHS))}, or in a new run for a smaller diffusion.ema_every than {every}"
        )
    weights = iter(mixed.weights)
    return {one: tuple(next(weights) for _ in LENGTHS) for one in there}


def _at(store: Store, stage: str, wanted: Set[int]) -> list[Checkpoint]:
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
