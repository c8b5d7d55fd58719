"""Where a life goes on: the newest checkpoint of the stage that this run may use and that is whole on every rank."""

import logging
from collections.abc import Callable
from typing import Any

from cluster.data.quarantine import Quarantine
from cluster.data.stream import Share
from cluster.runs import checkpoint
from cluster.runs.checkpoint import Checkpoint, DamagedCheckpoint
from cluster.storage import Store
from cluster.training.engine import Engine

log = logging.getLogger(__name__)

Gather = Callable[[Any], list[Any]]
"""Collects one object of every rank on all of them."""


def candidates(store: Store, stage: str, share: Share, dataset: Store, manifest: str, quarantines: bool) -> list[Checkpoint]:
    """The checkpoints that a run may go on from, newest first.

    One after a last step that was not a whole batch belongs to a shorter run: the one before it is the one to go on from.

    Args:
        store: the run's folder.
        stage: that is trained.
        share: the batch and the end of the run.
        dataset: what the stage reads.
        manifest: hash of its state.
        quarantines: whether the run may go on without damaged items.

    Raises:
        ValueError: if a checkpoint is of other data, or goes on without items that this run would train on.
    """
    found = []
    for key in checkpoint.list_checkpoints(store, stage):
        try:
            one = checkpoint.read_manifest(store, key)
        except DamagedCheckpoint as error:
            log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", error)
            continue
        if one.dataset != manifest:
            raise ValueError(
                f"{store.url}/{key} was trained on data {one.dataset}, but the run now reads {manifest} ({dataset.url}): "
                "give other data a run of another name (run.name)"
            )
        if one.quarantine and not quarantines:
            raise ValueError(
                f"{store.url}/{key} has {len(one.quarantine)} items in quarantine, but data.on_corrupt=stop trains on all: "
                "go on with data.on_corrupt=quarantine, or train on the mended data in a run of another name (run.name)"
            )
        whole_batches = one.progress < share.total and one.progress % share.batch == 0
        if whole_batches or one.progress == share.total:
            found.append(one)
    return found


def restore(engine: Engine, quarantine: Quarantine, store: Store, found: list[Checkpoint], gather: Gather) -> Checkpoint | None:
    """Set every rank's state from the first of these checkpoints that is whole on all ranks, None if none is; collective."""
    extents = engine.extents()
    for one in found:
        try:
            read, problem = checkpoint.reader(store, one, extents), ""
        except DamagedCheckpoint as error:
            problem = str(error)
        if problems := [text for text in gather(problem) if text]:
            log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", problems[0])
            continue
        engine.restore(read, one.steps)
        quarantine.add(one.quarantine)
        return one
    return None
