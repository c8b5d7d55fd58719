"""Hosts of namespaces, and the small runs that are trained on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime.hosts import Hosts
from tests.cluster.data.test_stream_faults import copy
from tests.cluster.support.multihost import leftovers, requires_namespaces
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
    """A head and three workers with one CPU each, and the shards in their S3 server; nothing of them is left behind."""
    requires_namespaces()
    with Hosts(tmp_path_factory.mktemp("hosts"), workers=3) as hosts, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.store_environment().items():
            patch.setenv(name, value)
        copy(tiny_shards, f"{hosts.url}/shards")
        hosts.wait(nodes=4)
        yield hosts
    assert leftovers(hosts) == []
