"""A whole training under each fault of the network, and one whose storage is gone for a minute, with the patience it has in earnest."""

import os
from pathlib import Path

import pytest
import torch

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.storage import open_store
from cluster.telemetry.metrics_log import read_rows
from cluster.training.job import Job, Place
from cluster.training.loop import train
from tests.cluster.data.test_stream_faults import FAULTS, copy, hands_out, through
from tests.cluster.support.faulty import TAR_RANGE, FaultyProxy, faulty_proxy
from tests.cluster.support.ranks import on_ranks
from tests.cluster.support.training import parts, train_on
from tests.tiny import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

END = "optim.epochs=3"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 20 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_on(1, tiny(shards, folder, END), folder)
    return folder


@pytest.fixture
def proxy(object_store):
    with faulty_proxy(object_store.endpoint) as proxy:
        yield proxy


def equal(run: Path | str, undisturbed: Path) -> bool:
    """Whether ledger, losses and weights are bitwise those of the undisturbed run."""
    rows, expected = (read_rows(open_store(str(folder)), "autoencoder") for folder in (run, undisturbed))
    return len(expected) == 20 and rows == expected and parts(run) == parts(undisturbed)


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on(
    fault: str, undisturbed: Path, shards: Path, s3_url: str, proxy: FaultyProxy, object_store, tmp_path: Path
) -> None:
    copy(shards, s3_url)
    proxy.arm(FAULTS[fault], TAR_RANGE, after=4)
    environment = object_store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
    on_ranks(1, through, environment, tiny(s3_url, tmp_path, END, "data.read_ahead=1"), str(tmp_path / "run"))
    assert proxy.happened == [fault for fault in FAULTS[fault] if fault]
    assert equal(tmp_path / "run", undisturbed)


def test_training_goes_on_with_new_credentials(
    undisturbed: Path, shards: Path, s3_url: str, proxy: FaultyProxy, object_store, tmp_path: Path
) -> None:
    """A program hands them out, and the server takes none that were handed out before the fault."""
    copy(shards, s3_url)
    handed_out, before = tmp_path / "handed_out", []

    def renewed() -> bool:
        before.append(handed_out.read_text().count("\n"))
        return before[-1] > before[0]

    proxy.renewed = renewed
    proxy.arm(["expired"], TAR_RANGE, after=4)
    keys = {name: "" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    environment = object_store.environment | keys | hands_out(tmp_path, object_store) | {"AWS_ENDPOINT_URL": proxy.endpoint}
    on_ranks(1, through, environment, tiny(s3_url, tmp_path, END, "data.read_ahead=1"), str(tmp_path / "run"))
    assert proxy.happened == ["expired"] and before[-1] > before[0]
    assert equal(tmp_path / "run", undisturbed)


def patiently(rank: int, ranks: int, environment: dict[str, str], experiment: Experiment, folder: str) -> None:
    """Train with these variables; timeouts are as they are for everybody."""
    os.environ.update(environment)
    dataset = open_store(experiment.data.url)
    job = Job(experiment, "autoencoder", open_store(folder), 1, dataset, load_manifest(dataset).hash)
    train(job, Place(rank, ranks, torch.device("cpu")), lambda snapshot: None)


def test_a_minute_without_storage_is_waited_out(
    undisturbed: Path, shards: Path, s3_url: str, proxy: FaultyProxy, object_store, tmp_path: Path
) -> None:
    """Shards and the run's own folder lie on the server; nobody listens there for 60 s, whichever of two ranks asks."""
    copy(shards, f"{s3_url}/shards")
    proxy.outage = 60.0
    proxy.arm(["outage"], TAR_RANGE, after=6)
    environment = object_store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
    experiment = tiny(f"{s3_url}/shards", tmp_path, END, "data.read_ahead=1", "run.checkpoint_every=18")
    on_ranks(2, patiently, environment, experiment, f"{s3_url}/run")
    assert proxy.happened == ["outage"]
    rows, expected = (read_rows(open_store(str(folder)), "autoencoder") for folder in (f"{s3_url}/run", undisturbed))
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected] and len(rows) == 20
