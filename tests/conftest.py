"""What every test shares: an environment that is nobody's, one thread a process, one local Ray, and marks that are told from fixtures."""

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import urllib3.util.connection  # noqa: F401  # opens a port when it is imported: the first test that does would be blamed for it

from tests import alone, starting

if TYPE_CHECKING:
    from cluster.runtime.ray_cluster import Resources
    from infra.objectstore import ObjectStore
    from tests.tiny import Trained

# No test may reach a developer's cluster or cloud account. Set before ray, torch and boto3 are imported.
for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
    del os.environ[name]
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "AWS_EC2_METADATA_DISABLED": "true"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # tests compute on the CPU, also where there is a GPU
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a test without Ray that asks it something gets an error, not a Ray of default size
os.environ["RAY_num_workers_soft_limit"] = "8"  # idle workers stay for the next test: each would import torch and compile the metrics
os.environ |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1,localhost"}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("patient", deadline=None)  # the machine's pauses are no property of the code
hypothesis.settings.load_profile("patient")

BUCKET = "tests"

starting.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    starting.mark(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> starting.Scheduling:
    return starting.Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's: to wait is no part of a test
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    assert item.config.cache, "tests of several processes wait for each other in pytest's cache folder: leave out -p no:cacheprovider"
    with alone.beside_others(item.config.cache.mkdir("alone"), item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from starting.watch(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from starting.watch(item))


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[ObjectStore]":
    """An S3 server with the bucket `tests`; the AWS_* variables lead this process and its children to it."""
    from infra.objectstore import ObjectStore

    with ObjectStore(tmp_path_factory.mktemp("objectstore")) as server, pytest.MonkeyPatch.context() as patch:
        server.make_bucket(BUCKET)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def local_ray(object_store: "ObjectStore") -> "Iterator[Resources]":
    """One local Ray with 4 logical CPUs or more, shared by all tests: it takes seconds to start and 0.9 GB.

    It starts after the S3 server, since its workers inherit the variables that lead there.
    """
    import ray

    from cluster.runtime.ray_cluster import connect

    yield connect(cpus=4)
    ray.shutdown()


@pytest.fixture(scope="session")
def shards(local_ray: "Resources", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated dataset of 20 training and 8 test clips; not to be changed."""
    from tests.tiny import make_shards

    return make_shards(tmp_path_factory.mktemp("tiny"), "train=20", "test=8")


@pytest.fixture(scope="session")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """A small run that `jobs/train.py` brought to DONE, and what the command said.

    With two CPUs a rank, the local Ray has room for two tasks and not for four, each of which begins with an import of torch.
    """
    from tests.tiny import ROOT, Trained, call, settings

    store = tmp_path_factory.mktemp("finished")
    said = call("train", "--config", ROOT / "jobs/configs/demo.yaml", "run.name=tiny", "workers.cpus=2", *settings(shards, store))
    return Trained(store / "runs" / "tiny", said.stdout, said.stderr)


@pytest.fixture(scope="session")
def finished(trained: "Trained") -> Path:
    """The folder of a small run that is DONE; not to be changed. Its store is two folders up."""
    return trained.folder
