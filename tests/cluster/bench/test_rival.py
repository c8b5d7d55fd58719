"""What is measured of both ways is the same work: the same losses, and the same reactions but for their rounding."""

import pytest
import torch

from cluster.bench.rival import ROLES, Rivalry
from cluster.config.loading import load
from reactdiff.data.sample import SIMULATED
from reactdiff.stage import Source
from tests.cluster.support.ranks import on_ranks
from tests.tiny import OVERRIDES


def measured(rank: int, ranks: int) -> dict[tuple[str, str], tuple[float, float, int]]:
    experiment, found = load(None, [*OVERRIDES, "workers.count=1"]), {}
    for stage in ("autoencoder", "diffusion", "generation"):
        rivalry = Rivalry(experiment, Source(SIMULATED, 100), stage, 1)
        for role in ROLES:
            cost = rivalry.measure(role)
            found[stage, role] = cost.wall, cost.cpu, cost.memory
            torch.set_deterministic_debug_mode("default")
    return found


@pytest.mark.starts
def test_both_ways_are_measured_at_each_stage_and_in_generation() -> None:
    (found,) = on_ranks(1, measured)
    assert len(found) == 6 and all(wall > 0 and cpu > 0 and memory > 1e8 for wall, cpu, memory in found.values())
