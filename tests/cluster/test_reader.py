"""What the reader promises: the arrays that were written, in as few reads as it takes, and damage that is named."""

from itertools import pairwise
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.manifest import load_manifest
from cluster.ranges import GAP, JOINED, Piece, Target, joined
from cluster.reader import Reader
from cluster.shards import CorruptData, decode_npy, read_index
from cluster.storage import open_store

WANTED = [("a", "mfcc"), ("a", "attributes"), ("b", "coefficients")]


def test_arrays_are_those_of_the_tar_and_their_checksums_are_summed(shards: Path) -> None:
    store = open_store(str(shards))
    manifest = load_manifest(store)
    reader, shard = Reader(store, manifest, "train"), manifest.shard("train", 1)
    index, clip = read_index(store, shard), int(manifest.counts("train")[0]) + 2
    read = reader.read(clip, WANTED)
    assert list(read.arrays) == WANTED
    places = [manifest.members.index(f"{person}.{name}.npy") for person, name in WANTED]
    for array, place in zip(read.arrays.values(), places, strict=True):
        data = store.read_range(f"{shard}.tar", int(index["offset"][2][place]), int(index["size"][2][place]))
        np.testing.assert_array_equal(array, decode_npy(data))
    assert read.checksum == index["crc"][2][places].astype(int).sum()


def test_a_person_is_one_read_that_holds_little_else(shards: Path) -> None:
    store = open_store(str(shards))
    manifest = load_manifest(store)
    reader = Reader(store, manifest, "train")
    person = [("b", name) for name in (*(stream.name for stream in manifest.streams), *manifest.targets)]
    read = reader.read(3, person)
    index = read_index(store, manifest.shard("train", 0))
    own = sum(int(index["size"][3][manifest.members.index(f"b.{name}.npy")]) for _, name in person)
    assert own <= read.bytes < own + 1024 * len(person)


def test_one_flipped_bit_is_named_with_shard_clip_member_and_both_checksums(shards: Path, tmp_path: Path) -> None:
    store = open_store(str(copytree(shards, tmp_path / "shards")))
    manifest = load_manifest(store)
    index, place = read_index(store, "train/000000"), manifest.members.index("b.attributes.npy")
    content = bytearray(store.read("train/000000.tar"))
    content[index["offset"][4][place] + 200] ^= 1
    store.put("train/000000.tar", bytes(content))
    reader = Reader(store, manifest, "train")
    assert reader.read(4, [("a", "attributes")]).checksum == index["crc"][4][manifest.members.index("a.attributes.npy")]
    with pytest.raises(CorruptData) as caught:
        reader.read(4, [("a", "mfcc"), ("b", "attributes"), ("b", "mfcc")])
    error = caught.value
    assert (error.shard, error.clip, error.member) == ("train/000000", reader.key(4), "b.attributes.npy")
    assert error.expected == f"{index['crc'][4][place]:08x}" != error.actual


def test_an_array_that_is_not_as_the_manifest_says_is_refused(shards: Path) -> None:
    store = open_store(str(shards))
    manifest = load_manifest(store)
    narrower = manifest.model_copy(update={"streams": [s.model_copy(update={"width": s.width - 1}) for s in manifest.streams]})
    with pytest.raises(ValueError, match=r"train/000000, clip \S+, a.mfcc.npy is not the float16 array \(100, 25\)"):
        Reader(store, narrower, "train").read(0, [("a", "mfcc")])
    with pytest.raises(ValueError, match=r"the dataset has no member a.w2v.npy; it has a.attributes.npy"):
        Reader(store, manifest, "train").read(0, [("a", "w2v")])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2 * GAP), st.integers(200, 2 * JOINED)), min_size=1, max_size=30))
def test_ranges_hold_every_piece_once_no_wide_gap_and_no_more_than_they_may(layout: list[tuple[bool, int, int]]) -> None:
    pieces, row, position = [], 0, 0
    target = [Target(memoryview(b""))]
    for number, (next_clip, gap, size) in enumerate(layout):
        row, position = row + next_clip, position + gap
        pieces.append(Piece(row, number, position, size, 0, target))
        position += size
    ranges = joined(7, pieces)
    assert [piece for part in ranges for piece in part.pieces] == pieces
    assert all(part.shard == 7 and part.start + part.length == part.pieces[-1].offset + part.pieces[-1].size for part in ranges)
    for part in ranges:
        for before, after in pairwise(part.pieces):
            assert after.offset - before.offset - before.size <= GAP
            assert after.row == before.row or after.offset + after.size - part.start <= JOINED
    for before, after in pairwise(ranges):
        last, first = before.pieces[-1], after.pieces[0]
        assert first.offset - last.offset - last.size > GAP or (first.row != last.row and first.offset + first.size - before.start > JOINED)
