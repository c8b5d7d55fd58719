"""jobs/checkpoint.py as people use it: over a run's folder made by hand, of two stages and a few small checkpoints."""

import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from cluster import cli
from cluster.config.loading import load
from cluster.data.manifest import Manifest, StreamEntry, publish
from cluster.runs.checkpoint import list_checkpoints, read_manifest
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.export import Export
from cluster.runs.lease import Lease
from cluster.runs.lineage import open_attempt
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, State, Superseded, assert_newest_life, newest_attempt, open_life, write_state
from cluster.storage import Store, open_store
from cluster.telemetry.metrics_log import MetricsLog, validation_name
from cluster.training.engine import Fragment
from infra.objectstore import ObjectStore
from jobs.checkpoint import main
from tests.conftest import BUCKET

STAGE = "autoencoder"
SETTINGS = ("run.keep=2", "run.keep_every=20", "run.keep_best=1", "evaluation.watch=1")


def checkpoint(*arguments: object) -> int:
    """The exit code of the command."""
    try:
        return cli.run(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """The folder of a run with checkpoints at 6, 12, ..., 36 of stage 1, of which nothing was deleted."""
    return make_run(str(tmp_path / "store"), tmp_path)


def make_run(url: str, folder: Path) -> Store:
    streams = [StreamEntry(name="au", kind="facial", width=15)]
    manifest = Manifest(kind="clips", frames=100, streams=streams, targets={}, members=[], splits={})
    publish(open_store(str(folder / "shards")), manifest)
    experiment = load(None, [*SETTINGS, f"data.url={folder / 'shards'}", f"run.store={url}"])
    store = open_store(url).at("runs/tiny")
    store.create("config.yaml", yaml.safe_dump(experiment.model_dump(mode="json")).encode())
    life = open_life(store, {})
    write_state(store, State("RUNNING", life, manifest.hash, manifest.hash, STAGE))
    attempt = open_attempt(store, life)
    writer, scores = writer_of(store), MetricsLog(store, life, attempt, validation_name(STAGE))
    for progress in range(6, 42, 6):
        commit(writer, progress, manifest.hash)
        scores.add(progress=progress, FRCorr=0.9 if progress == 12 else 0.1, FRDist=1.0)
    scores.flush()
    writer.close()
    return store


def writer_of(store: Store, superseded: Callable[[], None] = lambda: None) -> CheckpointWriter:
    return CheckpointWriter(store, lambda value: [value], 0, Retention(99), superseded)


def commit(writer: CheckpointWriter, progress: int, dataset: str = "", life: int = 1) -> None:
    begin(writer, progress, dataset, life)
    writer.commit()


def begin(writer: CheckpointWriter, progress: int, dataset: str = "", life: int = 1) -> None:
    facts = {"stage": STAGE, "progress": progress, "steps": progress, "dataset": dataset, "config": {}, "life": life, "attempt": 0}
    tensors = {"master": torch.full((4,), float(progress)), "average": torch.full((4,), progress + 0.5)}
    writer.begin([Fragment("w", (2, 2), 0, tensors)], {"low": torch.zeros(3)}, **facts)


def progresses(store: Store) -> list[int]:
    return [read_manifest(store, key).progress for key in list_checkpoints(store, STAGE)]


def part(store: Store, progress: int) -> str:
    """The key of the only part of a checkpoint."""
    (found,) = (one for one in (read_manifest(store, key) for key in list_checkpoints(store, STAGE)) if one.progress == progress)
    return next(iter(found.sizes))


def test_list_says_of_each_what_it_is_and_why_it_stays(run: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run.delete(part(run, 30))
    assert checkpoint("list", run.url) == 0
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {int(cells[1]): [cell.strip() for cell in cells] for cells in lines if cells[1].strip()}
    assert rows[12][2:] == ["000001.0", "0.0", "whole", "0.9000", "yes", "best"]
    assert [rows[at][-1] for at in (6, 18, 24, 36)] == ["-", "-", "last, every 20", "last"], "30 is damaged, so 24 is the second whole one"
    assert rows[30][4].startswith("1 of 1 parts are missing or cut short") and rows[30][-1] == "damaged, newer than the last"


def test_verify_reads_every_byte_and_names_what_is_damaged(run: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("verify", "tiny", "--store", run.url.removesuffix("/runs/tiny")) == 0
    said = capsys.readouterr()
    assert "6 of stage autoencoder and 0 of stage diffusion: all checkpoints that count are whole" in said.out and not said.err
    rotten, lost = part(run, 12), part(run, 18)
    data = bytearray(run.read(rotten))
    data[-1] ^= 1
    run.put(rotten, bytes(data))
    run.delete(lost)
    run.put(f"checkpoints/{STAGE}/{99:015d}-000001.0.json", b'{"version": 9}')
    assert checkpoint("verify", run.url) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and any(rotten in line and "has hash" in line for line in errors)
    assert any(f"{lost} is missing" in line for line in errors) and any("has version 9" in line for line in errors)


def test_export_writes_the_weights_of_a_checkpoint_with_what_builds_their_module(run: Store, tmp_path: Path) -> None:
    out = tmp_path / "new" / "weights.safetensors"
    assert checkpoint("export", run.url, "--out", out) == 0
    with safe_open(out, "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.full((2, 2), 36.5)) and set(file.keys()) == {"w", "low"}
        about = file.metadata()
    export = Export(**json.loads(about["export"]))
    assert (export.stage, export.progress, export.frames, export.streams[0]["name"]) == (STAGE, 36, 100, "au")
    assert json.loads(about["checkpoint"])["weights"] == "average"
    assert checkpoint("export", run.url, "--stage", STAGE, "--progress", 12, "--weights", "master", "--out", out) == 0
    with safe_open(out, "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.full((2, 2), 12.0))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_export_passes_over_what_is_not_whole_and_says_what_it_cannot_do(
    run: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.delete(part(run, 36))
    out = tmp_path / "weights.safetensors"
    assert checkpoint("export", run.url, "--out", out) == 0 and "at progress 30" in capsys.readouterr().out
    out.unlink()
    run.put(part(run, 30), bytes(run.size(part(run, 30))))
    for more, message in (
        (("--progress", 36), "has no whole checkpoint at progress 36 that counts; there is: 6, 12, 18, 24, 30"),
        (("--stage", "diffusion"), "checkpoints/diffusion has no whole checkpoint that counts; there is: none"),
        ((), "export another one (--progress), python jobs/checkpoint.py verify"),
    ):
        assert checkpoint("export", run.url, "--out", out, *more) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.starts
def test_gc_says_what_can_go_and_with_yes_it_goes_and_nothing_else(run: Store, capsys: pytest.CaptureFixture[str]) -> None:
    orphan = f"checkpoints/{STAGE}/parts/000001.0-{'0' * 32}.safetensors"
    run.put(orphan, b"of a rank that was killed")
    keys = {entry.key for entry in run.list() if entry.key != "lease.json"}
    going = {orphan, part(run, 6), part(run, 18)} | {key for key in keys if f"{6:015d}-" in key or f"{18:015d}-" in key}
    going = {key for key in going if key.startswith("checkpoints/")}
    assert checkpoint("gc", run.url) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in going) and f"{len(going)} objects" in said and "nothing was deleted, --yes does it" in said
    assert keys == {entry.key for entry in run.list() if entry.key != "lease.json"}
    assert checkpoint("gc", run.url, "--yes") == 0
    left = {entry.key for entry in run.list()}
    assert keys - left == going and {key.partition("/")[0] for key in left - keys} == {"lease.json", "lives", "lineage"}
    assert progresses(run) == [36, 30, 24, 12]
    capsys.readouterr()
    assert checkpoint("gc", run.url, "--yes") == 0 and "0 objects, 0.0 MB, deleted" in capsys.readouterr().out


@pytest.mark.starts
@pytest.mark.parametrize("more", [(), ("--yes",)])
def test_gc_leaves_a_run_alone_that_somebody_is_at(
    run: Store, more: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.runs.lease.LOOK", 0.01)
    monkeypatch.setattr("cluster.runs.lease.BEAT", 0.02)
    before = {entry.key for entry in run.list()}
    with Lease(run, "train"):
        assert checkpoint("gc", run.url, *more) == 75
    assert "is held by host" in (error := capsys.readouterr().err) and "(train)" in error
    assert {entry.key for entry in run.list()} == before | {"lease.json"} and progresses(run)[-1] == 6


@pytest.mark.starts
def test_a_writer_that_was_frozen_while_gc_deleted_its_part_leaves_no_checkpoint(run: Store) -> None:
    writer = writer_of(run, lambda: assert_newest_life(run, 1, 0))
    begin(writer, 42)
    uploaded = writer._upload
    assert uploaded is not None
    file = f"checkpoints/{STAGE}/{uploaded.result().file}"
    assert run.exists(file) and checkpoint("gc", run.url, "--yes") == 0 and not run.exists(file)
    with pytest.raises(Superseded):
        writer.commit()
    assert 42 not in progresses(run) and newest_attempt(run) == Attempt(2, 0)
    writer.close()


def test_verify_while_training_deletes_old_ones_calls_nothing_damaged(
    run: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint at 6 goes between its manifest and its part."""
    gone, manifest, lock = part(run, 6), list_checkpoints(run, STAGE)[-1], threading.Lock()
    read, happened = type(run).size, []

    def size(store: Store, key: str) -> int:
        with lock:
            if key == gone and not happened:
                happened.append(key)
                run.delete(manifest)
                run.delete(gone)
        return read(store, key)

    monkeypatch.setattr(type(run), "size", size)
    assert checkpoint("verify", run.url) == 0 and happened == [gone] and not capsys.readouterr().err


def test_a_run_in_a_bucket(object_store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path)
    assert checkpoint("list", run.url) == checkpoint("verify", run.url) == checkpoint("gc", run.url, "--yes") == 0
    assert "best" in capsys.readouterr().out and progresses(run) == [36, 30, 24, 12]
    assert checkpoint("export", run.url, "--out", tmp_path / "weights.safetensors") == 0


def test_help_teaches_and_an_unknown_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("--help") == 0
    said = capsys.readouterr().out
    assert "jobs/checkpoint.py verify s3://bucket/store/runs/NAME" in said and "run.keep_every" in said
    assert checkpoint("gc", "none", "--store", tmp_path) == 1
    assert "there is no run at" in capsys.readouterr().err
