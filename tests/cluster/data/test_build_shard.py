"""What building one shard promises: every usable clip, the reason for every other, once and for all."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.data.build_shard import BuiltShard, ShardSource, build_shard, checked_clip
from cluster.data.shards import decode_npy, read_index
from cluster.storage import Store
from reactdiff.data.files import ClipError
from reactdiff.data.keyed import generator
from reactdiff.data.sample import Clip, StreamSpec


@dataclass(frozen=True)
class Pair:
    key: str


@dataclass
class Memory:
    """A tree in memory that notes what is read; clips in `bad` cannot be."""

    seed: int = 0
    bad: set[str] = field(default_factory=set)
    reads: list[str] = field(default_factory=list)
    splits = ("train",)
    streams = (StreamSpec("mfcc", "acoustic", 26),)
    frames = 50

    def read(self, pair: Pair) -> Clip:
        self.reads.append(pair.key)
        if pair.key in self.bad:
            raise ClipError(pair.key, "some/file.npy", "it is truncated")
        rng = generator("memory tree", self.seed, pair.key)
        widths = {"mfcc": (26, np.float16), "attributes": (25, np.float32), "coefficients": (58, np.float32)}
        people = {p: {name: rng.random((50, width)).astype(kind) for name, (width, kind) in widths.items()} for p in "ab"}
        return Clip(pair.key, people, {"subjects": {"a": f"A of {pair.key}", "b": "B"}})


PAIRS = [Pair(key) for key in ("one", "two", "three")]


def source(store: Store, tree: Any, strict: bool = False) -> ShardSource:
    return ShardSource(tree, store, strict)


def test_a_shard_holds_every_usable_clip_and_its_record_says_why_the_others_are_not_there(store: Store) -> None:
    tree = Memory(bad={"two"})
    built = build_shard(source(store, tree), "train/000000", PAIRS)
    assert built.refused == [("two", "clip two: some/file.npy: it is truncated")]
    assert built.subjects == {"a": ["A of one", "A of three"], "b": ["B", "B"]}
    index = read_index(store, "train/000000", built.info.index)
    assert index["key"].tolist() == [b"one", b"three"]
    start, size = int(index["offset"][1][0]), int(index["size"][1][0])
    data = store.read("train/000000.tar")[start : start + size]
    assert np.array_equal(decode_npy(data), tree.read(PAIRS[2]).people["a"]["attributes"])
    assert BuiltShard.decode(store.read("train/000000.done.json")) == built


def test_a_finished_shard_is_found_and_only_its_first_clip_read_again(store: Store) -> None:
    tree = Memory()
    first = build_shard(source(store, tree), "train/000000", PAIRS)
    tree.reads.clear()
    assert build_shard(source(store, tree), "train/000000", PAIRS) == first
    assert tree.reads == ["one"]


def test_a_shard_cut_off_before_its_record_is_built_again_to_the_same_bytes(store: Store) -> None:
    first = build_shard(source(store, Memory()), "train/000000", PAIRS)
    store.delete("train/000000.done.json")
    store.put("train/000000.tar", b"half")
    assert build_shard(source(store, Memory()), "train/000000", PAIRS) == first
    assert store.size("train/000000.tar") == first.info.bytes


def test_other_data_under_the_same_names_is_noticed_and_nothing_rewritten(store: Store) -> None:
    build_shard(source(store, Memory(seed=1)), "train/000000", PAIRS)
    before = store.read("train/000000.tar")
    with pytest.raises(ValueError, match=r"train/000000.tar was prepared from other data: clip one, member a\.attributes\.npy"):
        build_shard(source(store, Memory(seed=2)), "train/000000", PAIRS)
    assert store.read("train/000000.tar") == before
    store.put("train/000000.tar", before[:-1])
    with pytest.raises(ValueError, match=f"has {len(before) - 1} bytes, but was written with {len(before)}"):
        build_shard(source(store, Memory(seed=1)), "train/000000", PAIRS)


def test_strict_writes_nothing_of_a_shard_with_a_refused_clip_and_everything_once_it_is_repaired(store: Store) -> None:
    tree = Memory(bad={"two"})
    assert build_shard(source(store, tree, strict=True), "train/000000", PAIRS).refused
    assert list(store.list()) == []
    tree.bad.clear()
    assert build_shard(source(store, tree, strict=True), "train/000000", PAIRS).info.clips == 3


def test_a_shard_of_no_usable_clip_leaves_nothing_and_is_tried_again(store: Store) -> None:
    tree = Memory(bad={"one", "two", "three"})
    built = build_shard(source(store, tree), "train/000000", PAIRS)
    assert built.info.clips == 0 and len(built.refused) == 3
    assert list(store.list()) == []
    tree.bad.clear()
    assert build_shard(source(store, tree), "train/000000", PAIRS).info.clips == 3


@pytest.mark.parametrize(
    ("person", "array", "rule"),
    [
        ("a", np.zeros((50, 26), np.float32), r"a\.mfcc: it is float32 \(50, 26\), but in this dataset it is float16 \(50, 26\)"),
        ("b", np.zeros((50, 25), np.float16), r"b\.mfcc: it is float16 \(50, 25\)"),
        ("b", np.zeros((51, 26), np.float16), r"b\.mfcc: it is float16 \(51, 26\)"),
        ("a", None, r"a\.mfcc: it is missing"),
        ("a", np.full((50, 26), np.nan, np.float16), r"a\.mfcc: row 0, column 0 is nan; all numbers must be finite"),
    ],
)
def test_a_clip_unlike_the_dataset_is_refused_by_person_and_stream(tmp_path: Path, person: str, array: Any, rule: str) -> None:
    clip = Memory().read(PAIRS[0])
    streams = {name: old for name, old in clip.people[person].items() if name != "mfcc"} | ({} if array is None else {"mfcc": array})
    changed = replace(clip, people=clip.people | {person: streams})

    class Other(Memory):
        def read(self, pair: Pair) -> Clip:
            return changed

    with pytest.raises(ClipError, match=f"clip one: {rule}"):
        checked_clip(Other(), PAIRS[0])
