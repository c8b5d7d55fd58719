"""Which checkpoints count, and that of two drivers, whatever befalls them, no older one leaves anything that a reader would take."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from cluster.runs import checkpoint
from cluster.runs.checkpoint import Checkpoint, CheckpointWriter
from cluster.runs.lineage import counting, open_attempt
from cluster.runs.state import Attempt, Superseded, newest_attempt, open_life, read_state
from cluster.storage import Store
from tests.cluster.support.interleaving import EXPORT, World

SEEDS = range(200)


def worlds() -> Iterator[tuple[int, World]]:
    """What became of each seed's two drivers."""
    for seed in SEEDS:
        world = World(seed)
        world.run()
        yield seed, world


def test_200_interleavings_of_two_drivers_leave_nothing_of_an_older_life_that_a_reader_would_take() -> None:
    happened: Counter[str] = Counter()
    for seed, world in worlds():
        assert world.violations == [], f"seed {seed}: {world.faults}"
        state = read_state(world.store)
        assert state and state.status == "DONE" and world.store.exists(EXPORT), f"seed {seed}: {world.faults}"
        happened.update(world.faults)
        happened.update(world.late)
    assert all(happened[what] > 100 for what in ("stopped", "cut off", "killed")), happened
    assert all(happened[what] > 3 for what in ("create", "delete")), f"attempts that were over wrote, and took back: {happened}"


def test_the_checker_finds_what_a_fence_before_the_create_alone_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(writer: CheckpointWriter, found: Checkpoint) -> None:
        writer._store.create(f"checkpoints/{found.stage}/{found.file}", json.dumps(asdict(found)).encode())

    prune = checkpoint._prune
    monkeypatch.setattr(CheckpointWriter, "_create", create)
    monkeypatch.setattr(checkpoint, "_prune", lambda store, found, keep, superseded: prune(store, found, keep, lambda: None))
    assert any(world.violations for _, world in worlds())


def test_the_checker_finds_what_readers_would_take_who_count_every_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "counting", lambda store, of=None: lambda key: True)
    assert any("is taken for the run's" in text for _, world in worlds() for text in world.violations)
