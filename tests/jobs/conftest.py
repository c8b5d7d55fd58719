"""What the tests of sweeps and retraining share: a small dataset with every split, and a way to let it grow."""

from pathlib import Path

import pytest

from cluster.runtime.ray_cluster import Resources
from tests.tiny import make_shards


def pack(folder: Path, train: int) -> Path:
    """Make or grow a dataset of so many training clips in `folder`/shards, through jobs/prepare.py."""
    return make_shards(folder, f"train={train}", "val=4", "gate=4", "test=4", per_shard=4)


@pytest.fixture(scope="session")
def every_split(local_ray: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small dataset with train, val, gate and test; not to be changed, but to be copied."""
    folder = tmp_path_factory.mktemp("every_split")
    pack(folder, train=8)
    return folder
