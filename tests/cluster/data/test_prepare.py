"""What preparing a dataset promises: all of the tree, in order, whole or not at all; again goes on, and grows."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.data.manifest import load_appropriateness, load_manifest, read_file
from cluster.data.prepare import PrepareResult, RefusedClips, prepare
from cluster.data.reader import Reader
from cluster.storage import Store, open_store
from reactdiff.data.appropriateness import MATRIX
from reactdiff.data.react2024 import Tree
from reactdiff.data.synthetic import Simulation, write_tree

SIMULATION = Simulation(frames=50, clips={"train": 5, "val": 4}, sharing=2)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree") / "tree"
    write_tree(SIMULATION, root, workers=1)
    return root


@pytest.fixture
def root(simulated: Path, tmp_path: Path) -> Path:
    """A tree that a test may break."""
    return shutil.copytree(simulated, tmp_path / "tree")


def run(root: Path, store: Store, strict: bool = False, progress=lambda done, total: None, one_to_many: bool = False) -> PrepareResult:
    return prepare(Tree(root), store, clips_per_shard=2, strict=strict, progress=progress, one_to_many=one_to_many)


def keys(store: Store, split: str) -> list[str]:
    reader = Reader(store, load_manifest(store), split)
    return [reader.key(clip) for clip in range(reader.clips)]


def file_of(root: Path, split: str, clip: int, kind: str = "3D_FV_files", suffix: str = ".npy") -> Path:
    pair = Tree(root).pairs(split)[clip]
    return root / split / kind / f"{pair.speaker_path}{suffix}"


def shards(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list() if entry.key.endswith((".tar", ".index.npy"))}


@pytest.mark.usefixtures("local_ray")
def test_the_dataset_is_the_tree_in_its_order(store: Store, simulated: Path) -> None:
    progress = []
    done = run(simulated, store, progress=lambda *counts: progress.append(counts))
    tree, manifest = Tree(simulated), load_manifest(store)
    assert done == PrepareResult(manifest, {"train": 5, "val": 4}, [])
    assert progress[-1] == (9, 9)
    assert manifest.stream_specs == tree.streams and manifest.frames == 50
    assert manifest.provenance == tree.provenance()
    assert manifest.counts("train").tolist() == [2, 2, 1]
    for split in tree.splits:
        reader = Reader(store, manifest, split)
        for number, pair in enumerate(tree.pairs(split)):
            clip = tree.read(pair)
            assert reader.key(number) == pair.key
            read = reader.read(number, [(person, name) for person in "ab" for name in clip.people[person]])
            for (person, name), array in read.arrays.items():
                assert np.array_equal(array, clip.people[person][name])
        subjects = json.loads(read_file(store, manifest.split(split).subjects))
        assert subjects["b"] == [tree.read(pair).meta["subjects"]["b"] for pair in tree.pairs(split)]
    assert load_appropriateness(store, manifest, "train") is None
    assert np.array_equal(load_appropriateness(store, manifest, "val"), tree.appropriateness("val"))


@pytest.mark.usefixtures("local_ray")
def test_the_same_tree_again_changes_nothing(simulated: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    first = run(simulated, store)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    again = run(simulated, store)
    assert again == PrepareResult(first.manifest, {"train": 0, "val": 0}, [])
    assert {entry.key: store.read(entry.key) for entry in store.list()} == before


@pytest.mark.usefixtures("local_ray")
def test_an_interrupted_preparation_publishes_nothing_and_goes_on_to_the_same_dataset(simulated: Path, root: Path, tmp_path: Path) -> None:
    """Until the interrupt, whoever reads the last clip waits for ever."""
    store, whole = open_store(str(tmp_path / "data")), open_store(str(tmp_path / "whole"))
    last = file_of(root, "val", 3)
    last.unlink()
    os.mkfifo(last)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, store, progress=interrupt)
    last.unlink()
    shutil.copy(file_of(simulated, "val", 3), last)
    records = [entry.key for entry in store.list() if entry.key.endswith(".done.json")]
    assert 0 < len(records) < 5
    assert not store.exists("dataset.json")
    times = {key: (tmp_path / "data" / key.replace("done.json", "tar")).stat().st_mtime_ns for key in records}
    done = run(root, store)
    assert times == {key: (tmp_path / "data" / key.replace("done.json", "tar")).stat().st_mtime_ns for key in records}
    assert done.manifest.hash == run(simulated, whole).manifest.hash
    assert shards(store) == shards(whole)


@pytest.mark.usefixtures("local_ray")
def test_a_grown_tree_adds_shards_behind_the_old_ones(store: Store, root: Path) -> None:
    first = run(root, store).manifest
    old, order = shards(store), {split: keys(store, split) for split in ("train", "val")}
    write_tree(Simulation(frames=50, clips={"train": 8, "val": 4, "gate": 2}, sharing=2), root, workers=1)
    grown = run(root, store)
    assert grown.added == {"train": 3, "val": 0, "gate": 2}
    assert old.items() <= shards(store).items()
    assert keys(store, "train")[:5] == order["train"] and len(keys(store, "train")) == 8
    assert keys(store, "val") == order["val"]
    assert grown.manifest.identity == first.hash != grown.manifest.hash
    assert load_manifest(store, first.hash) == first
    assert len(json.loads(read_file(store, grown.manifest.split("train").subjects))["a"]) == 8


@pytest.mark.usefixtures("local_ray")
def test_who_reacts_appropriately_in_train_is_kept_where_it_is_asked_for_and_then_for_good(root: Path, tmp_path: Path) -> None:
    plain, asked = open_store(str(tmp_path / "plain")), open_store(str(tmp_path / "asked"))
    assert run(root, plain).manifest.splits["train"].appropriateness is None
    manifest = run(root, asked, one_to_many=True).manifest
    assert np.array_equal(load_appropriateness(asked, manifest, "train"), Tree(root).appropriateness("train"))
    write_tree(replace(SIMULATION, clips={"train": 6, "val": 4}), root, workers=1)
    grown = run(root, asked).manifest
    assert load_appropriateness(asked, grown, "train").shape == (12, 12) and grown.hash != manifest.hash
    (root / MATRIX).unlink()
    np.save(root / "neighbour_emotion_val.npy", np.eye(8))
    with pytest.raises(ValueError, match=r"does not say which reactions are appropriate in split train.*without --one-to-many"):
        run(root, open_store(str(tmp_path / "another")), one_to_many=True)


@pytest.mark.usefixtures("local_ray")
def test_refused_clips_leave_the_matrix_and_come_back_when_repaired(root: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    broken = file_of(root, "val", 1)
    content = broken.read_bytes()
    broken.write_bytes(content[:-100])
    done = run(root, store)
    pairs, whole = Tree(root).pairs("val"), Tree(root).appropriateness("val")
    assert [(split, key) for split, key, _ in done.refused] == [("val", pairs[1].key)]
    assert str(broken.relative_to(root)) in done.refused[0][2]
    assert keys(store, "val") == [pairs[i].key for i in (0, 2, 3)]
    left = [0, 2, 3, 4, 6, 7]
    assert np.array_equal(load_appropriateness(store, done.manifest, "val"), whole[np.ix_(left, left)])
    assert run(root, store).refused == done.refused
    broken.write_bytes(content)
    repaired = run(root, store)
    assert repaired.added == {"train": 0, "val": 1} and not repaired.refused
    assert keys(store, "val") == [pairs[i].key for i in (0, 2, 3, 1)]
    order = [0, 2, 3, 1, 4, 6, 7, 5]
    assert np.array_equal(load_appropriateness(store, repaired.manifest, "val"), whole[np.ix_(order, order)])


@pytest.mark.usefixtures("local_ray")
def test_a_row_that_loses_its_last_appropriate_reaction_is_named(root: Path, tmp_path: Path) -> None:
    matrix = np.eye(8, dtype=np.uint8)
    matrix[6] = np.arange(8) == 5  # clip 2 mirrored: only clip 1 mirrored is appropriate
    np.save(root / "neighbour_emotion_val.npy", matrix)
    shutil.rmtree(file_of(root, "val", 1).parent)
    store = open_store(str(tmp_path / "data"))
    with pytest.raises(ValueError, match=rf"split val: .* 1 rows .*: {Tree(root).pairs('val')[2].key} \(mirrored\)"):
        run(root, store)
    assert not store.exists("dataset.json")


@pytest.mark.usefixtures("local_ray")
def test_strict_refuses_all_because_of_one_and_goes_on_when_it_is_repaired(root: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    broken = file_of(root, "train", 0, "Emotion", ".csv")
    broken = broken.parent.parent / "P1" / broken.name
    content = broken.read_text()
    broken.write_text(content.replace("0.", "nan", 1))
    with pytest.raises(RefusedClips, match=r"1 clips cannot be used, the first in split train: .*nan"):
        run(root, store, strict=True)
    assert not store.exists("dataset.json")
    broken.write_text(content)
    assert run(root, store, strict=True).added == {"train": 5, "val": 4}


@pytest.mark.usefixtures("local_ray")
def test_a_dataset_of_another_tree_is_not_touched(simulated: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    run(simulated, store)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    others = {
        "has frames 50, but the tree has 100": Simulation(frames=100, clips={"train": 5, "val": 4}, sharing=2),
        "split train .* has 1 clips that the tree lacks": Simulation(frames=50, clips={"train": 4, "val": 4}, sharing=2),
        "was prepared from other data: clip": Simulation(seed=1, frames=50, clips={"train": 5, "val": 4}, sharing=2),
    }
    for number, (message, simulation) in enumerate(others.items()):
        write_tree(simulation, tmp_path / f"tree{number}", workers=1)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / f"tree{number}", store)
    assert {entry.key: store.read(entry.key) for entry in store.list()} == before


@pytest.mark.usefixtures("local_ray")
def test_a_number_claimed_by_other_content_is_left_alone(simulated: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    store.create("train/000001.plan.json", b'{"content": "of another preparation"}')
    manifest = run(simulated, store).manifest
    assert manifest.split("train").shards.number == [0, 3, 2]
    assert run(simulated, store).manifest == manifest
    assert keys(store, "train") == [pair.key for pair in Tree(simulated).pairs("train")]
