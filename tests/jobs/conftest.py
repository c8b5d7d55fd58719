"""What the tests of sweeps and retraining share: a small dataset with every split, and a way to let it grow."""

from pathlib import Path

import pytest

from tests.tiny import FRAMES, job

CLIPS = "train={train},val=4,gate=4,test=4"


def pack(folder: Path, train: int) -> Path:
    """Make or grow a dataset of so many training clips in `folder`/shards, through jobs/prepare.py."""
    job("prepare", "simulate", folder / "tree", "--clips", CLIPS.format(train=train), "--frames", str(FRAMES))
    job("prepare", "react2024", folder / "tree", folder / "shards", "--clips-per-shard", "4")
    return folder / "shards"


@pytest.fixture(scope="session")
def every_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small dataset with train, val, gate and test; not to be changed, but to be copied."""
    folder = tmp_path_factory.mktemp("every_split")
    pack(folder, train=8)
    return folder
