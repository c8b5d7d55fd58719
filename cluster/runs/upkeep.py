"""What people do with the checkpoints of a run: see which there are, compare them with their hashes, take weights out, clear up."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from safetensors.torch import save

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.runs.averages import averaged_weights
from cluster.runs.checkpoint import Checkpoint, DamagedCheckpoint, GoneCheckpoint, assemble, read_manifest
from cluster.runs.environment import command, environment
from cluster.runs.export import export_of
from cluster.runs.inventory import Inventory, delete_objects
from cluster.runs.lease import Lease
from cluster.runs.lineage import is_manifest, open_attempt
from cluster.runs.retention import Retention, checkpoint_scores
from cluster.runs.saved import SavedRun
from cluster.runs.state import Attempt, assert_newest_life, newest_attempt, open_life
from cluster.storage import NotFound, Store, content_hash
from cluster.storage.hashing import HashMismatch, assert_content
from cluster.storage.parallel import parallel_map
from reactdiff.stage import Source, stages_of

Weights = Literal["average", "master"]
"""Averaged weights, which are evaluated, or those that the optimiser updates."""

Garbage = dict[str, int]
"""Key -> bytes of what can go."""


def inventories(store: Store, experiment: Experiment, of: Attempt | None = None) -> dict[str, Inventory]:
    """What lies below `checkpoints/` of each stage, with scores.

    Args:
        store: the run's folder.
        experiment: its configuration.
        of: the attempt to which checkpoints count or not; the newest one if it is None.
    """
    return {stage: Inventory(store, stage, of, checkpoint_scores(store, stage)) for stage in stages_of(experiment.model)}


def verify_checkpoints(store: Store, there: dict[str, Inventory], progress: Callable[[int, int], None]) -> list[str]:
    """Read the parts of all checkpoints that count and compare each with its hash; what is wrong with them, in a sentence each.

    Args:
        store: the run's folder.
        there: what there is.
        progress: told (parts compared, parts in all).
    """
    wrong, parts = list[str](), dict[str, tuple[str, str]]()
    for stage, inventory in there.items():
        for one in inventory.found:
            if one.foreign or (one.counts and not one.readable):
                wrong.append(one.wrong)
            elif one.counts:
                with suppress(GoneCheckpoint):
                    for part in read_manifest(store, one.key).parts:
                        parts[f"checkpoints/{stage}/{part.file}"] = part.hash, one.key
    for done, problem in enumerate(parallel_map(partial(_problem, store), list(parts.items())), 1):
        wrong += [problem] if problem else []
        progress(done, len(parts))
    return wrong


def _problem(store: Store, named: tuple[str, tuple[str, str]]) -> str:
    """What is wrong with a part; nothing if its checkpoint was deleted since it was listed, as training does."""
    key, (digest, manifest) = named
    try:
        assert_content(store, key, digest)
    except NotFound:
        return f"{store.url}/{key} is missing" if store.exists(manifest) else ""
    except HashMismatch as error:
        return str(error)
    return ""


def choose_checkpoint(store: Store, there: dict[str, Inventory], stage: str = "", progress: int | None = None) -> Checkpoint:
    """A whole checkpoint that counts: of the last stage that has one, the one with the most progress, unless another is asked for.

    Raises:
        ValueError: if there is none, with those there are.
    """
    whole = {name: [one for one in inventory.found if one.counts and not one.wrong] for name, inventory in there.items()}
    if stage and stage not in there:
        raise ValueError(f"the run has no stage {stage}; it has {', '.join(there)}")
    stage = stage or next((name for name in reversed(there) if whole[name]), next(iter(there)))
    found = [one for one in whole[stage] if progress in (None, one.progress)]
    if not found:
        known = ", ".join(str(one.progress) for one in whole[stage]) or "none"
        at = "" if progress is None else f" at progress {progress}"
        raise ValueError(f"{store.url}/checkpoints/{stage} has no whole checkpoint{at} that counts; there is: {known}")
    try:
        return read_manifest(store, max(found, key=lambda one: (one.progress, one.by)).key)
    except GoneCheckpoint as error:
        raise ValueError(f"{error}, for training goes on; give the same command again") from None


def export_checkpoint(run: SavedRun, found: Checkpoint, weights: Weights, path: Path, length: float = 0) -> None:
    """Write weights and buffers of a checkpoint as one safetensors file, with its description in the metadata.

    `export` there is the description of an export (`cluster/runs/export.py`), whose module takes these weights; `checkpoint` says where
    they come from. Averaged weights of equal progress and length are those of the run's own export, and have its hash.

    With a `length` they are an average of that relative length (`averaged_weights`).

    Raises:
        ValueError: if a checkpoint is damaged or gone, or the length cannot be had; nothing is written then.
    """
    try:
        tensors = averaged_weights(run.store, run.experiment, found, length) if length else assemble(run.store, found, weights)
    except DamagedCheckpoint as error:
        raise ValueError(
            f"{error}: export another one (--progress), python jobs/checkpoint.py verify {run.store.url} names all that is damaged"
        ) from None
    read = run.dataset if found.stage == "autoencoder" else run.latents().store
    manifest = load_manifest(read, found.dataset)
    export = export_of(run.experiment, Source(manifest.stream_specs, manifest.frames), found, content_hash(save(tensors)))
    origin = {"run": run.store.url, "manifest": found.file, "steps": found.steps, "weights": weights, "quarantine": len(found.quarantine)}
    if weights == "average":
        export = replace(export, diffusion=export.diffusion | {"ema_length": length})
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(save(tensors, metadata={"export": json.dumps(asdict(export)), "checkpoint": json.dumps(origin)}))
    os.replace(half, path)


@contextmanager
def clearing(store: Store, experiment: Experiment, really: bool) -> Iterator[tuple[Garbage, Callable[[], None]]]:
    """Hold a run's lease and find what can go: what attempts that are over left behind, and checkpoints that need not stay.

    Whoever deletes is a life of the run, and an attempt: a driver that was frozen meanwhile and wakes finds itself superseded, and its
    parts, which are deleted here, are never taken for a checkpoint.

    Args:
        store: the run's folder.
        experiment: its configuration, which says what stays.
        really: whether anything may be deleted; else nothing is written but the lease.

    Yields:
        key -> bytes, and what deletes it all.

    Raises:
        Held: if somebody is at the run.
        Superseded: if somebody has taken it over before all was deleted.
    """
    with Lease(store, command(), wait=False) as lease:
        by = Attempt(newest_attempt(store).life + 1, 0)
        if really:
            life = open_life(store, environment(experiment))
            by = Attempt(life, open_attempt(store, life))
        garbage: Garbage = {}
        for stage, inventory in inventories(store, experiment, by).items():
            keys = {*inventory.orphans(by), *inventory.excess(by, Retention.of(experiment, stage))}
            there = sorted(keys & inventory.sizes.keys(), key=lambda key: (not is_manifest(key), key))
            garbage |= {key: inventory.sizes[key] for key in there}

        def delete() -> None:
            assert really
            lease.assert_held()
            assert_newest_life(store, *by)
            delete_objects(store, garbage)

        yield garbage, delete
