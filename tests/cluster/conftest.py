"""The stores that tests of the machinery write to: a folder, and a real S3 server."""

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.storage import Store, open_store
from infra.objectstore import ObjectStore
from tests.conftest import BUCKET


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    """One that a failed test leaves behind would disturb those after it."""
    yield
    if machines := sys.modules.get("tests.cluster.support.machines"):
        for run in machines.started:
            run.kill()
        machines.started.clear()


@pytest.fixture
def s3_url(object_store: ObjectStore) -> str:
    """An empty prefix of the S3 server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    return open_store(str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url"))
