"""Corrupt data ends a run that names it, or counts nothing in one that was told to go on: from the same step on every rank, for good."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cluster.data.manifest import load_manifest
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData
from cluster.runs import checkpoint
from cluster.runs.build_latents import build_latents
from cluster.runs.latents import LatentDataset, corrupt_clips, encode_shard, read_range
from cluster.runs.saved import open_run
from cluster.runtime.ray_cluster import Resources
from cluster.storage import open_store
from reactdiff.data.order import Order
from reactdiff.stage import LATENT, Source, build, stage
from tests.cluster.support.damage import flip
from tests.cluster.support.streaming import cut
from tests.cluster.support.training import parts, train_on
from tests.tiny import ROOT, call, settings, tiny

QUARANTINE = "data.on_corrupt=quarantine"
TOLERANCE = 1e-5
BAD = 1
"""Position, in the first step, of the item whose bytes are damaged."""


def test_the_list_holds_an_item_from_its_first_bad_position_on() -> None:
    quarantine = Quarantine([BadItem(7, 100, "first")])
    assert [quarantine.holds(7, position) for position in (99, 100, 140)] == [False, True, True]
    assert not quarantine.holds(8, 100)
    assert quarantine.add([BadItem(3, 50, "later"), BadItem(7, 140, "again"), BadItem(3, 10, "sooner")]) == [BadItem(3, 10, "sooner")]
    assert quarantine.entries == [BadItem(3, 10, "sooner"), BadItem(7, 100, "first")] and len(quarantine) == 2


def first_items(shards: Path, count: int) -> list[int]:
    """The items at the first positions of the order of a tiny experiment."""
    experiment = tiny(shards, shards)
    counts = load_manifest(open_store(str(shards))).counts("train")
    order = Order(2 * counts, experiment.seed, experiment.data.block, experiment.data.group, experiment.data.order)
    return order.at(np.arange(count)).tolist()


def member_of(item: int) -> str:
    """A member that stage 1 reads for this item, and not for the other one of its clip."""
    return f"{'ab'[item % 2]}.mfcc.npy"


def rows_of(folder: Path) -> list[dict]:
    from cluster.telemetry.metrics_log import read_rows

    return read_rows(open_store(str(folder)), "autoencoder")


@pytest.fixture(scope="module")
def damaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with a flipped bit in what one item reads."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(shards, folder)
    item = first_items(folder, 2)[BAD]
    flip(folder, "train", item // 2, member_of(item))
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_on(1, tiny(shards, folder, "optim.epochs=2"), folder)
    return folder


@pytest.fixture(scope="module")
def quarantined(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quarantined")
    train_on(1, tiny(damaged, folder, "optim.epochs=2", QUARANTINE), folder)
    return folder


def test_by_default_the_run_ends_and_names_shard_clip_member_and_both_checksums(damaged: Path, tmp_path: Path) -> None:
    item = first_items(damaged, 2)[BAD]
    with pytest.raises(mp.ProcessRaisedException) as caught:
        train_on(1, tiny(damaged, tmp_path), tmp_path)
    where = rf"shard train/\d{{6}}, clip \S+, member {re.escape(member_of(item))}"
    assert re.search(rf"{where}: the bytes read have checksum [0-9a-f]{{8}}, but they were written with [0-9a-f]{{8}}", str(caught.value))


def test_every_other_step_reads_the_bytes_it_would_have_read_and_the_item_is_missing_in_both_epochs(
    undisturbed: Path, quarantined: Path, shards: Path
) -> None:
    item = first_items(shards, 2)[BAD]
    store, experiment = open_store(str(shards)), tiny(shards, shards)
    manifest = load_manifest(store)
    kind = stage("autoencoder", experiment.model, experiment.diffusion, Source(manifest.stream_specs, manifest.frames))
    missing = Reader(store, manifest, "train").read(item // 2, list(kind.reads(item % 2).values())).checksum
    less = [one["ledger"] - other["ledger"] for one, other in zip(rows_of(undisturbed), rows_of(quarantined), strict=True)]
    assert sorted(less) == [0] * 12 + [missing] * 2 and less[0] == missing and missing in less[6:]


def test_the_loss_is_the_mean_over_the_valid_items(undisturbed: Path, quarantined: Path, shards: Path) -> None:
    store, experiment = open_store(str(shards)), tiny(shards, shards)
    manifest = load_manifest(store)
    reader = Reader(store, manifest, "train")
    kind = stage("autoencoder", experiment.model, experiment.diffusion, Source(manifest.stream_specs, manifest.frames))
    module, losses = build(kind, experiment.seed), []
    for item in first_items(shards, 6):
        wanted = kind.reads(item % 2)
        arrays = reader.read(item // 2, list(wanted.values())).arrays
        losses.append(float(module({name: torch.from_numpy(arrays[source][None]) for name, source in wanted.items()}).detach()))
    assert rows_of(undisturbed)[0]["loss"] == pytest.approx(np.mean(losses), rel=TOLERANCE)
    others = np.delete(losses, BAD)
    assert rows_of(quarantined)[0]["loss"] == pytest.approx(np.mean(others), rel=TOLERANCE)
    assert abs(np.mean(losses) - np.mean(others)) > 1e-3


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_has_the_same_list_and_the_same_losses(quarantined: Path, damaged: Path, tmp_path: Path, ranks: int) -> None:
    rows, expected = train_on(ranks, tiny(damaged, tmp_path, "optim.epochs=2", QUARANTINE), tmp_path), rows_of(quarantined)
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=TOLERANCE)
    said = [line for line in Path(f"{tmp_path}.log").read_text().splitlines() if line.startswith("QUARANTINED")]
    item = first_items(damaged, 2)[BAD]
    assert len(said) == 1 and f"item {item} (clip {item // 2}, side {item % 2} of split train)" in said[0]
    assert listed(tmp_path) == listed(quarantined) == [(item, BAD)]


def listed(folder: Path) -> list[tuple[int, int]]:
    store = open_store(str(folder))
    found = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert all("member" in bad.why for bad in found.quarantine)
    return [(bad.item, bad.position) for bad in found.quarantine]


def test_a_tar_that_ends_too_early_ends_a_run_or_costs_it_the_items_beyond_its_end(shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "shards"))
    store = open_store(str(data))
    last = int(load_manifest(store).counts("train")[0]) - 1
    key = cut(store, 0, last, "b.attributes.npy")
    where = rf"CorruptData: shard train/000000, clip {key}, member b\.\S+"
    with pytest.raises(mp.ProcessRaisedException, match=f"{where}: the tar ends before all of it"):
        train_on(1, tiny(data, tmp_path), tmp_path / "stopped")
    lists = []
    for ranks in (1, 2):
        rows = train_on(ranks, tiny(data, tmp_path, QUARANTINE), tmp_path / f"{ranks}")
        assert all(row["loss"] > 0 for row in rows) and len(rows) == 7
        lists.append(listed(tmp_path / f"{ranks}"))
    assert lists[0] == lists[1] and [item for item, _ in lists[0]] == [2 * last + 1]


def test_a_resumed_run_ends_identical_although_the_object_was_mended_meanwhile(quarantined: Path, damaged: Path, tmp_path: Path) -> None:
    mended, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(damaged, mended)
    train_on(1, tiny(mended, folder, "optim.epochs=0.9", QUARANTINE), folder)
    item = first_items(damaged, 2)[BAD]
    flip(mended, "train", item // 2, member_of(item))
    rows = train_on(1, tiny(mended, folder, "optim.epochs=2", QUARANTINE), folder, life=2)
    assert {row["life"] for row in rows} == {1, 2}
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in rows_of(quarantined)]
    assert parts(folder) == parts(quarantined)


def test_a_run_that_has_a_list_is_not_gone_on_with_by_one_that_trains_on_all(quarantined: Path, damaged: Path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"has 1 items in quarantine, but data\.on_corrupt=stop trains on all"):
        train_on(1, tiny(damaged, quarantined, "optim.epochs=3"), quarantined, life=2)


def test_a_step_of_nothing_but_bad_items_has_loss_and_gradient_zero_and_training_goes_on(shards: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, data)
    for item in first_items(shards, 4)[2:]:
        flip(data, "train", item // 2, member_of(item))
    overrides = ("optim.batch=2", "optim.epochs=0.2", "optim.clip=1", "run.checkpoint_every=2", "run.keep=9", QUARANTINE)
    rows = train_on(2, tiny(data, folder, *overrides), folder)
    assert (rows[1]["loss"], rows[1]["gradient_norm"], rows[1]["ledger"]) == (0, 0, 0)
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 for row in (rows[0], rows[2], rows[3]))
    store = open_store(str(folder))
    assert [checkpoint.read_manifest(store, name).steps for name in checkpoint.list_checkpoints(store, "autoencoder")] == [4, 3, 2, 1]


@pytest.fixture
def damaged_latents(finished: Path, shards: Path, tmp_path: Path) -> LatentDataset:
    """A finished autoencoder over a copy of its dataset that is damaged in the first shard, where nothing is encoded yet."""
    source = tmp_path / "shards"
    shutil.copytree(shards, source)
    flip(source, "train", 1, "b.mfcc.npy")
    return replace(open_run(str(finished), "").latents(), dataset=open_store(str(source)), home=open_store(str(tmp_path)))


def test_encoding_a_damaged_clip_stops_or_gives_zeros_and_no_other_shard_notices(damaged_latents: LatentDataset, shards: Path) -> None:
    with pytest.raises(CorruptData, match=r"shard train/000000, clip \S+, member b\.mfcc\.npy"):
        encode_shard(damaged_latents, "train", 0)
    allowed = replace(damaged_latents, on_corrupt="quarantine")
    encoded = encode_shard(allowed, "train", 0)
    assert list(encoded.corrupt) == [1] and "member b.mfcc.npy" in encoded.corrupt[1]
    assert encode_shard(allowed, "train", 0) == encoded, "what is done is kept"
    whole = replace(damaged_latents, dataset=open_store(str(shards)), home=damaged_latents.home.at("whole"))
    assert encode_shard(whole, "train", 0).info.tar != encoded.info.tar
    assert encode_shard(whole, "train", 1) == encode_shard(allowed, "train", 1)


def test_latents_of_a_damaged_source_list_the_clip_and_train_without_it_or_are_refused(
    damaged_latents: LatentDataset, finished: Path, tmp_path: Path, local_ray: Resources
) -> None:
    experiment = open_run(str(finished), "").experiment
    with pytest.raises(CorruptData, match=r"member b\.mfcc\.npy"):
        build_latents(damaged_latents, experiment.workers, lambda done, total: None)
    allowed = replace(damaged_latents, on_corrupt="quarantine")
    manifest = build_latents(allowed, experiment.workers, lambda done, total: None)
    assert list(corrupt_clips(manifest, "train")) == [1] and not corrupt_clips(manifest, "test")
    for refused in (damaged_latents.manifest, lambda: build_latents(damaged_latents, experiment.workers, lambda done, total: None)):
        with pytest.raises(ValueError, match=r"lack 1 clips of split train.*first clip 1 \(shard train/000000.*data.on_corrupt=quarantine"):
            refused()
    store = allowed.store
    reader, wanted = Reader(store, manifest, "train"), [("a", LATENT), ("b", LATENT)]
    latents = {clip: np.stack(list(reader.read(clip, wanted).arrays.values())) for clip in range(reader.clips)}
    assert not latents[1].any() and all(latents[clip].any() for clip in latents if clip != 1)
    others = np.concatenate([latents[clip] for clip in latents if clip != 1])
    low, high = read_range(store, manifest)
    assert np.array_equal(low, others.min(axis=0)) and np.array_equal(high, others.max(axis=0))
    rows = train_on(2, tiny(allowed.store.url, tmp_path / "run", QUARANTINE), tmp_path / "run", stage="diffusion")
    run = open_store(str(tmp_path / "run"))
    newest = checkpoint.read_manifest(run, checkpoint.list_checkpoints(run, "diffusion")[0])
    assert [(bad.item, bad.position) for bad in newest.quarantine] == [(2, 0), (3, 0)]
    checksums = {clip: reader.read(clip, wanted).checksum for clip in latents}
    assert sum(row["ledger"] for row in rows) == 2 * sum(checksums[clip] for clip in latents if clip != 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_says_how_to_go_on_goes_on_without_the_clip_and_never_scores_a_damaged_one(shards: Path, tmp_path: Path) -> None:
    data, store = tmp_path / "shards", tmp_path / "store"
    shutil.copytree(shards, data)
    key, scored = flip(data, "train", 4, "a.mfcc.npy"), flip(data, "test", 2, "a.mfcc.npy")
    flip(data, "train", 4, "a.attributes.npy")  # which the mean reaction is made of
    command = ["--config", ROOT / "jobs/configs/demo.yaml", "run.name=damaged", *settings(data, store)]

    def failed(*more: str) -> str:
        said = call("train", *command, *more, check=False)
        state = json.loads((store / "runs/damaged/state.json").read_text())
        assert said.returncode == 1 and state["status"] == "FAILED" and state["why"] in said.stderr
        return state["why"]

    assert f": CorruptData: shard train/000000, clip {key}, member a." in (why := failed())
    assert why.startswith("stage autoencoder failed (data), rank ")
    assert "restore it from a copy" in why and why.endswith("data.on_corrupt=quarantine trains without damaged clips, and scores none")
    why = failed(QUARANTINE)
    assert f"clip {scored}, member a.mfcc.npy" in why
    run = open_store(str(store / "runs/damaged"))
    assert [checkpoint.read_manifest(run, checkpoint.list_checkpoints(run, s)[0]).quarantine for s in ("autoencoder", "diffusion")]
    flip(data, "test", 2, "a.mfcc.npy")
    assert "DONE" in (call("train", *command, QUARANTINE), (store / "runs/damaged/state.json").read_text())[1]
