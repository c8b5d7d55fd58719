"""The stores that tests of the machinery write to: a folder, and a real S3 server."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.placement import Resources
from cluster.storage import Store, open_store
from infra.objectstore import ObjectStore

BUCKET = "tests"


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server with the bucket `tests`; the AWS_* variables lead this process and its children to it."""
    with ObjectStore(tmp_path_factory.mktemp("objectstore")) as server, pytest.MonkeyPatch.context() as patch:
        server.make_bucket(BUCKET)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def local_ray(object_store: ObjectStore, local_ray: Resources) -> Resources:
    """The local Ray of all tests, started after the S3 server: its workers inherit the variables that lead there."""
    return local_ray


@pytest.fixture
def s3_url(object_store: ObjectStore) -> str:
    """An empty prefix of the S3 server."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    return open_store(str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url"))
