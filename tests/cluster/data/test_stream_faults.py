"""Whatever networks and servers do while shards are read, training goes on, and each step gets the bytes of the undisturbed run."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.client import Config

from cluster.data.stream import Batch, Share
from cluster.storage import StorageError, open_store, s3
from cluster.storage.folder import FolderStore
from cluster.telemetry.metrics_log import read_rows
from tests.cluster.support.faulty import TAR_RANGE, FaultyProxy, faulty_proxy
from tests.cluster.support.ranks import on_ranks
from tests.cluster.support.streaming import make_latents, open_stream, read_all, same
from tests.cluster.support.training import parts, train_here, train_on
from tests.conftest import BUCKET
from tests.tiny import tiny

FAULTS = {
    "cut": ["cut"] * 3,
    "endless": ["endless"] * 3,
    "busy": ["busy"] * 6,
    "late": ["late"] * 4,
    "stall": ["stall"] * 2,
    "trickle": ["trickle"] * 2,
    "flip": ["flip"] * 2,
    "lose": ["lose"] * 2,
    "down": ["down"] * 6,
    "outage": ["outage"],
    "expired": ["expired"],
}
"""What the proxy does to ranges of tars."""

SHARE = Share(6, 80, 1, 0)


def hasten() -> None:
    """Storage that takes silence for a fault after tenths of a second, in a process of its own."""
    s3.STALL = 0.4
    s3.CHUNK = 10_000
    s3.CONFIG = s3.CONFIG.merge(Config(read_timeout=0.4))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """The batches of a small dataset in a folder."""
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    make_latents(store, [7, 6, 7], width=200)
    return read_all(store, SHARE)


@pytest.fixture(scope="module")
def on_s3(object_store) -> str:
    """The same dataset on the server."""
    url = f"s3://{BUCKET}/faults"
    make_latents(open_store(url), [7, 6, 7], width=200)
    return url


@pytest.fixture
def proxy(object_store, monkeypatch: pytest.MonkeyPatch):
    for name in ("STALL", "CHUNK", "CONFIG"):
        monkeypatch.setattr(s3, name, getattr(s3, name))
    hasten()
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("fault", FAULTS)
def test_every_step_is_the_undisturbed_one(fault: str, undisturbed: list[Batch], on_s3: str, proxy: FaultyProxy) -> None:
    proxy.outage = 1.0
    proxy.arm(FAULTS[fault], TAR_RANGE, after=3)
    batches = read_all(open_store(on_s3), SHARE, read_ahead=1)
    assert proxy.happened == [fault for fault in FAULTS[fault] if fault]
    assert len(batches) == len(undisturbed) and all(map(same, batches, undisturbed))


def test_a_stream_that_is_closed_does_not_wait_for_the_server_to_come_back(on_s3: str, proxy: FaultyProxy) -> None:
    before = set(threading.enumerate())
    stream = open_stream(open_store(on_s3), SHARE, read_ahead=1)
    batches = stream.batches(0)
    next(batches)
    proxy.arm(["down"] * 10_000, TAR_RANGE)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, batches)
        while len(proxy.happened) < 4:
            time.sleep(0.01)
        stream.close()
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith(("reader", "index", "planner", "drawer")):
                thread.join(30)
                assert not thread.is_alive(), thread
        assert isinstance(rest.exception(30), StorageError)
    assert len(proxy.faults) > 9_000


def test_credentials_that_expire_in_the_middle_are_asked_for_again(
    undisturbed: list[Batch], on_s3: str, proxy: FaultyProxy, object_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a program; the server takes none that were handed out before the fault."""
    handed_out = tmp_path / "handed_out"
    for name, value in hands_out(tmp_path, object_store).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = open_store(on_s3)
    proxy.renewed = lambda: handed_out.read_text().count("\n") > 1
    proxy.arm(["expired"], TAR_RANGE, after=3)
    batches = read_all(store, SHARE, read_ahead=1)
    assert proxy.happened == ["expired"] and proxy.renewed()
    assert len(batches) == len(undisturbed) and all(map(same, batches, undisturbed))


def hands_out(folder: Path, server) -> dict[str, str]:
    """Variables by which an AWS client asks a program for its credentials; each time is a line of `folder`/handed_out."""
    (folder / "keys.json").write_text(f'{{"Version": 1, "AccessKeyId": "{server.access_key}", "SecretAccessKey": "{server.secret_key}"}}')
    (folder / "program.sh").write_text(f"echo again >> '{folder}/handed_out'\ncat '{folder}/keys.json'\n")
    (folder / "config").write_text(f"[default]\ncredential_process = sh {folder}/program.sh\n")
    return {"AWS_CONFIG_FILE": str(folder / "config")}


def through(rank: int, ranks: int, environment: dict[str, str], experiment, folder: str) -> None:
    """Train with these environment variables, which the fork server did not have, and with short timeouts."""
    os.environ.update(environment)
    hasten()
    train_here(rank, ranks, experiment, folder, 1, "autoencoder")


def copy(source: Path, url: str) -> None:
    """Put a dataset's files on the server."""
    store = open_store(url)
    for entry in FolderStore(source).list():
        store.put_file(entry.key, source / entry.key)


def test_training_goes_on_under_one_fault_after_the_other(
    shards: Path, s3_url: str, proxy: FaultyProxy, object_store, tmp_path: Path
) -> None:
    """In an order that REACTDIFF_SEED chooses. Ledger, losses and weights are those of the undisturbed run, bit for bit."""
    copy(shards, s3_url)
    train_on(1, tiny(shards, tmp_path, "optim.epochs=3"), tmp_path / "whole")
    faults = ["cut", "busy", "busy", "late", "flip", "stall", "endless", "trickle", "lose", "expired", "down", "outage"]
    random.Random(int(os.environ.get("REACTDIFF_SEED", "0"))).shuffle(faults)
    proxy.outage = 1.0
    proxy.arm([step for fault in faults for step in (fault, "")], TAR_RANGE, after=2)
    environment = object_store.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
    on_ranks(1, through, environment, tiny(s3_url, tmp_path, "optim.epochs=3", "data.read_ahead=1"), str(tmp_path / "disturbed"))
    assert proxy.happened == faults
    rows, expected = (read_rows(open_store(str(tmp_path / run)), "autoencoder") for run in ("disturbed", "whole"))
    assert len(rows) == 20 and rows == expected
    assert parts(tmp_path / "disturbed") == parts(tmp_path / "whole")
