"""Where a worker is and what that costs, by the machines that Ray knows."""

from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.driver import berths
from cluster.driver.berths import Berths
from cluster.runtime.nodes import Node
from cluster.telemetry.books import Berth

GPUS = Node("a1", "10.0.0.1", "gpu-1", {"pool": "gpu", "instance-type": "g5.12xlarge"}, {"CPU": 48.0, "GPU": 4.0}, {})
MINE = Node("b2", "10.0.0.2", "mine", {}, {"CPU": 2.0}, {})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answers of the cluster, the next one first: its machines, or an error."""
    answers: list[Any] = []

    def nodes() -> list[Node]:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(berths, "nodes", nodes)
    return answers


def test_a_worker_is_found_by_its_machine_s_id_or_address_and_the_cluster_is_asked_once(asked: list[Any]) -> None:
    asked.append([GPUS, MINE])
    there = Berths({})
    assert there.of("a1", {"CPU": 4.0, "GPU": 1.0}) == there.of("10.0.0.1", {"GPU": 1.0}) == Berth("gpu-1", 5.672, 0.25)
    assert there.of("b2", {"CPU": 1.0}) == Berth("mine", -1.0, 0.5)


def test_a_machine_that_has_come_since_is_asked_for_and_one_that_nobody_knows_costs_what_nobody_knows(asked: list[Any]) -> None:
    asked += [[MINE], [MINE, GPUS], RayError("no answer")]
    there = Berths({"any": 1.0})
    assert there.of("b2", {"CPU": 1.0}) == Berth("mine", 1.0, 0.5) and there.of("a1", {"GPU": 1.0}) == Berth("gpu-1", 1.0, 0.25)
    assert there.of("c3", {"CPU": 1.0}) == there.of("", {"CPU": 1.0}) == Berth("")
