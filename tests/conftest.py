"""What every test shares: an environment that is nobody's, one thread a process, and one local Ray."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cluster.placement import Resources

# No test may reach a developer's cluster or cloud account. Set before ray, torch and boto3 are imported.
for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
    del os.environ[name]
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="session")
def local_ray() -> "Iterator[Resources]":
    """One local Ray with 4 logical CPUs or more, shared by all tests: it takes seconds to start and 0.9 GB."""
    import ray

    from cluster.placement import connect

    yield connect(cpus=4)
    ray.shutdown()
