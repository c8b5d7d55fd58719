"""Which checkpoints count, and that of two drivers, whatever befalls them, no older one leaves anything that a reader would take."""

from collections import Counter

import pytest

from cluster.runs.checkpoint import CheckpointWriter
from cluster.runs.state import read_state
from tests.cluster.support.interleaving import EXPORT, World

SEEDS = range(200)


def worlds() -> list[World]:
    found = []
    for seed in SEEDS:
        world = World(seed)
        world.run()
        found.append(world)
    return found


def test_200_interleavings_of_two_drivers_leave_nothing_of_an_older_life_that_a_reader_would_take() -> None:
    happened: Counter[str] = Counter()
    for seed, world in enumerate(worlds()):
        assert world.violations == [], f"seed {seed}: {world.faults}"
        state = read_state(world.store)
        assert state and state.status == "DONE" and world.store.exists(EXPORT), f"seed {seed}: {world.faults}"
        happened.update(world.faults)
        happened["again"] += world.again
        happened["writes"] += len(world.log)
        happened["lives"] += world._state_life
    print(happened)
