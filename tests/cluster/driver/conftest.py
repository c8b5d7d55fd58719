"""A run of two ranks, and two machines for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.support.machines import Machines, Running, machines


@pytest.fixture(scope="session")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """The run of two ranks that nothing disturbs."""
    run = Running(shards, tmp_path_factory.mktemp("undisturbed"), "undisturbed", "workers.count=2")
    assert run.end() == 0, run.said
    return run


@pytest.fixture
def two() -> Iterator[Machines]:
    with machines(2) as there:
        there.wait(2)
        yield there
