"""What the reader promises: the arrays that were written, in as few reads as it takes, and damage that is named."""

from itertools import pairwise
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.data import ranges
from cluster.data import reader as reader_module
from cluster.data.manifest import load_manifest
from cluster.data.ranges import DIRECT, GAP, MAX_COALESCED, WIDE_GAP, ReadPlan
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData, decode_npy, read_index
from cluster.storage import NotFound, Store, open_store
from reactdiff.clip import PERSONS
from tests.cluster.support.streaming import cut, make_clips

WANTED = [("a", "mfcc"), ("a", "attributes"), ("b", "coefficients")]


def test_arrays_are_those_of_the_tar_and_their_checksums_are_summed(shards: Path) -> None:
    store = open_store(str(shards))
    manifest = load_manifest(store)
    reader, shard = Reader(store, manifest, "train"), manifest.shard("train", 1)
    index, clip = read_index(store, shard), int(manifest.counts("train")[0]) + 2
    read = reader.read(clip, WANTED)
    assert list(read.arrays) == WANTED
    places = [manifest.members.index(f"{person}.{name}.npy") for person, name in WANTED]
    tar = store.read(f"{shard}.tar")
    for array, place in zip(read.arrays.values(), places, strict=True):
        start, size = int(index["offset"][2][place]), int(index["size"][2][place])
        np.testing.assert_array_equal(array, decode_npy(tar[start : start + size]))
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


def test_clips_are_found_by_their_keys_and_one_that_is_not_there_is_compared_with_the_first_ones(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(shards))
    reader = Reader(store, load_manifest(store), "train")
    keys = [reader.key(clip) for clip in range(reader.clips)]
    assert [key.decode() for shard in reader.keys() for key in shard] == keys
    assert [reader.clip_number(key) for key in keys] == list(range(reader.clips))
    wrong = f"{keys[-1]}x"
    assert reader.find_clip(wrong) is None
    with pytest.raises(ValueError, match=f"none of the 20 clips of split train has the key '{wrong}'; the nearest: {keys[-1]}, "):
        reader.clip_number(wrong)
    monkeypatch.setattr(reader_module, "NEAR", 7)
    with pytest.raises(ValueError, match=r"none of the 20 clips .*; the nearest of the first 7: ") as caught:
        reader.clip_number(wrong)
    near = str(caught.value).partition("first 7: ")[2].removesuffix(" (or choose --split)").split(", ")
    assert near and set(near) <= set(keys[:7])


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


@pytest.mark.parametrize("direct", [DIRECT, 1000])
def test_of_a_tar_that_ends_too_early_only_the_members_beyond_its_end_are_damaged(
    store: Store, direct: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "DIRECT", direct)
    manifest = make_clips(store, [5, 4])
    wanted = [(person, name) for person in PERSONS for name in ("mfcc", "coefficients", "attributes")]
    whole = [Reader(store, manifest, "train").read(clip, wanted) for clip in range(9)]
    key = cut(store, 0, 4, "b.attributes.npy")
    reader = Reader(store, manifest, "train")
    clips, members = np.arange(9), np.tile([reader.member(source) for source in wanted], (9, 1))
    places = [np.zeros((9, *reader.array(source)[0]), reader.array(source)[1]) for source in wanted]
    plan = reader.plan(clips, members, places)
    results = [reader.fetch(plan, span) for span in reader.ranges(plan)]
    assert len(results) == 2, "all that is wanted of a shard comes in one range"
    damaged = {error.member: error for result in results for error in result.damaged.values()}
    assert sorted(damaged) == ["b.attributes.npy", "b.coefficients.npy", "b.mfcc.npy"]
    assert {(error.shard, error.clip, error.failure, error.actual) for error in damaged.values()} == {("train/000000", key, "data", "")}
    for clip, read in enumerate(whole):
        for source, place in zip(wanted, places, strict=True):
            if (clip, source[0]) != (4, "b"):
                np.testing.assert_array_equal(place[clip], read.arrays[source])
    assert reader.read(4, wanted[:3]).checksum == Reader(store, manifest, "train").read(4, wanted[:3]).checksum
    with pytest.raises(CorruptData, match=rf"shard train/000000, clip {key}, member b\.attributes\.npy: the tar ends before all of it"):
        reader.read(4, wanted)
    store.put("train/000000.tar", b"")
    with pytest.raises(CorruptData, match="shard train/000000, clip clip-0-0, member"):
        reader.read(0, wanted)
    store.delete("train/000000.tar")
    with pytest.raises(NotFound):
        reader.read(0, wanted)


def test_an_array_that_is_not_as_the_manifest_says_is_refused(shards: Path) -> None:
    store = open_store(str(shards))
    manifest = load_manifest(store)
    narrower = manifest.model_copy(update={"streams": [s.model_copy(update={"width": s.width - 1}) for s in manifest.streams]})
    with pytest.raises(ValueError, match=r"train/000000, clip \S+, a.mfcc.npy is not the float16 array \(100, 25\)"):
        Reader(store, narrower, "train").read(0, [("a", "mfcc")])
    with pytest.raises(ValueError, match=r"the dataset has no member a.w2v.npy; it has a.attributes.npy"):
        Reader(store, manifest, "train").read(0, [("a", "w2v")])


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2 * WIDE_GAP), st.integers(200, 2 * MAX_COALESCED), st.integers(1, 3)),
        min_size=1,
        max_size=30,
    )
)
def test_ranges_answer_every_want_once_without_wide_gaps_and_are_no_longer_than_they_may(
    wanted_members: list[tuple[bool, int, int, int]],
) -> None:
    clip, position, columns = 0, 0, []
    for number, (next_clip, gap, size, times) in enumerate(wanted_members):
        clip, position = clip + next_clip, position + gap
        columns += [(0, 0, 7, clip, number, position, size, 0)] * times
        position += size
    plan = ReadPlan([memoryview(bytes(8))], [1], *(list(column) for column in zip(*columns, strict=True)))
    ranges = plan.coalesce()
    assert [(part.first, part.last) for part in ranges] == list(pairwise([0, *(part.last for part in ranges)]))
    assert ranges[-1].last == len(columns)
    for part in ranges:
        numbers = range(part.first, part.last)
        assert part.shard == 7 and part.start == plan.offset[part.first]
        assert part.start + part.length == plan.offset[part.last - 1] + plan.size[part.last - 1]
        for before, after in pairwise(numbers):
            if plan.offset[before] != plan.offset[after]:
                assert plan.offset[after] - plan.offset[before] - plan.size[before] <= WIDE_GAP
                assert plan.clip[before] == plan.clip[after] or plan.offset[after] + plan.size[after] - part.start <= MAX_COALESCED
        wanted = sum(dict((plan.offset[number], plan.size[number]) for number in numbers).values())
        members = len({plan.offset[number] for number in numbers})
        assert 2 * wanted >= part.length - GAP * (members - 1)
    assert all(len({plan.offset[n] for n in range(part.first, part.last)}) == 1 for whole in ranges for part in plan.single(whole))


def test_entries_of_two_groups_do_not_share_a_range() -> None:
    rows = [(0, 0, 0, 0, number, 1000 * number, 900, 0) for number in range(6)]
    plan = ReadPlan([memoryview(bytes(8))], [1], *(list(column) for column in zip(*rows, strict=True)))
    assert [(part.first, part.last) for part in plan.coalesce([True, True, False, False, True, False])] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert plan.coalesce() == [(0, 0, 5900, 0, 6)]
