"""Hosts of namespaces, and the small dataset that is trained on there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime.hosts import Hosts
from tests.cluster.support.multihost import cluster
from tests.tiny import job


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `shards`, made by processes that are gone afterwards: the hosts want the memory and the cores."""
    folder = tmp_path_factory.mktemp("tiny")
    job("prepare", "simulate", folder / "tree", "--clips", "train=20,test=8", "--frames", "100")
    job("prepare", "react2024", folder / "tree", folder / "shards", "--clips-per-shard", "6")
    return folder / "shards"


@pytest.fixture(scope="module")
def hosts(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head and three workers that the tests of a module share."""
    with cluster(tmp_path_factory.mktemp("hosts"), tiny_shards, workers=3) as hosts:
        yield hosts
