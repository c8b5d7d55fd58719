"""Where a life goes on: the newest checkpoint of the stage that this run may use and that is whole on every rank."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from cluster.config.identity import differing
from cluster.config.schema import Experiment
from cluster.data.quarantine import Quarantine
from cluster.data.stream import Share
from cluster.runs import checkpoint
from cluster.runs.checkpoint import Checkpoint, DamagedCheckpoint, GoneCheckpoint, Target
from cluster.runs.environment import ARITHMETIC
from cluster.runs.state import read_life
from cluster.storage import Store
from cluster.storage.parallel import parallel_map
from cluster.training.engine import Engine

log = logging.getLogger(__name__)

Gather = Callable[[Any], list[Any]]
"""Collects one object of every rank on all of them."""


class NoUsableCheckpoint(RuntimeError):
    """A stage has checkpoints, and none that its run could go on from.

    Attributes:
        advice: what to do; it is not what other data ask for.
    """

    failure = "data"

    def __init__(self, said: str, advice: str = ""):
        super().__init__(said)
        self.advice = advice


class Candidates(NamedTuple):
    """The checkpoints of a stage: those that its run may go on from, newest first, and of each other one what is wrong with it."""

    usable: list[Checkpoint]
    problems: list[str]


def candidates(store: Store, stage: str, share: Share, dataset: Store, manifest: str, experiment: Experiment) -> Candidates:
    """The checkpoints that a run may go on from, newest first.

    One after a last step that was not a whole batch belongs to a shorter run: the one before it is the one to go on from.

    Args:
        store: the run's folder.
        stage: that is trained.
        share: the batch and the end of the run.
        dataset: what the stage reads.
        manifest: hash of its state.
        experiment: the run's configuration.

    Raises:
        ValueError: if a checkpoint is of other data, of another identity or of another version of this program, or goes on without
            items that this run would train on.
    """
    usable, problems = [], []
    keys = checkpoint.list_checkpoints(store, stage)
    for key, one in zip(keys, parallel_map(partial(_read, store), keys), strict=True):
        if isinstance(one, GoneCheckpoint):
            continue
        if isinstance(one, DamagedCheckpoint):
            log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", one)
            problems.append(str(one))
            continue
        where = f"{store.url}/{key}"
        if one.dataset != manifest:
            raise ValueError(
                f"{where} was trained on data {one.dataset}, but the run now reads {manifest} ({dataset.url}): "
                "give other data a run of another name (run.name)"
            )
        if fields := differing(one.config, experiment):
            raise ValueError(
                f"{where} was trained with another identity; differing: {', '.join(fields)}. "
                "Set these back, or choose a run of another name (run.name)"
            )
        if one.quarantine and experiment.data.on_corrupt != "quarantine":
            raise ValueError(
                f"{where} has {len(one.quarantine)} items in quarantine, but data.on_corrupt=stop trains on all: "
                "go on with data.on_corrupt=quarantine, or train on the mended data in a run of another name (run.name)"
            )
        if one.progress == share.total or (one.progress < share.total and one.progress % share.batch == 0):
            usable.append(one)
        else:
            problems.append(f"{where} ends with a step of less than {share.batch} items, the last one of a shorter run")
    return Candidates(usable, problems)


def _read(store: Store, key: str) -> Checkpoint | DamagedCheckpoint:
    try:
        return checkpoint.read_manifest(store, key)
    except DamagedCheckpoint as error:
        return error


def restore(engine: Engine, quarantine: Quarantine, store: Store, stage: str, found: Candidates, gather: Gather) -> Checkpoint | None:
    """Set every rank's state from the first of these checkpoints that is whole on all ranks; None where there are none; collective.

    Raises:
        NoUsableCheckpoint: on all ranks, if there are some and none is usable. To begin again would throw away what was trained.
    """
    held = [Target(fragment.name, fragment.start, fragment.tensors) for fragment in engine.held()]
    problems, problem = list(found.problems), ""
    for one in found.usable:
        try:
            checkpoint.load_into(store, one, held)
            problem = ""
        except DamagedCheckpoint as error:
            problem = str(error)
        if said := [text for text in gather(problem) if text]:
            log.error("CHECKPOINT DAMAGED, falling back to the one before: %s", said[0])
            problems.append(said[0])
            continue
        engine.resume(one.steps)
        quarantine.add(one.quarantine)
        return one
    if problems:
        raise NoUsableCheckpoint(
            f"stage {stage} of {store.url} has {len(problems)} checkpoints and none can be used: {'; '.join(problems)}",
            "restore one of them from a copy and give the same command again; "
            f"to train the stage anew, delete {store.url}/checkpoints/{stage} before",
        )
    return None


def tell_other_arithmetic(store: Store, found: Checkpoint) -> None:
    """Say so if a checkpoint was computed by a release whose steps have other last bits."""
    if read_life(store, found.life).get("arithmetic", 1) != ARITHMETIC:
        log.warning(
            "the checkpoint at %d items is of a release that rounds otherwise in each step: from here on this run has the same order of "
            "items as one that was never interrupted, and no longer the same bits",
            found.progress,
        )
