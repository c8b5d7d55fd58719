"""What a shard promises: any WebDataset reader reads it, the index finds every byte of it, and damage is named."""

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cluster.data.shards import (
    CorruptData,
    ShardInfo,
    decode_npy,
    encode_npy,
    index_dtype,
    members,
    read_index,
    shard_name,
    upload_shard,
    write_shard,
)
from cluster.storage import Store, content_hash
from reactdiff.data.keyed import generator
from reactdiff.data.sample import Clip

ARRAYS = ("mfcc", "coefficients", "attributes", "au")


def clip(number: int, frames: int = 50, key: str = "") -> Clip:
    rng = generator("test shard", number)
    widths = {"mfcc": 26, "au": 15, "attributes": 25, "coefficients": 58}
    kinds = {"mfcc": np.float16, "au": np.float16, "attributes": np.float32, "coefficients": np.float32}
    people = {p: {n: rng.standard_normal((frames, w)).astype(kinds[n]) for n, w in widths.items()} for p in "ab"}
    return Clip(key or f"clip-{number}", people, {"subjects": {"a": "Zoë", "b": number}})


CLIPS = [clip(number) for number in range(5)]


@pytest.fixture
def shard(store: Store) -> tuple[Store, str, ShardInfo]:
    name = shard_name("train", 3)
    return store, name, upload_shard(store, name, CLIPS, ARRAYS)


def test_members_are_sorted_person_by_person_with_the_json_last() -> None:
    assert members(["mfcc", "au"]) == ("a.au.npy", "a.mfcc.npy", "b.au.npy", "b.mfcc.npy", "json")
    with pytest.raises(ValueError, match=r"'w\.v' cannot name"):
        members(["w.v"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does not close what it reads
def test_stock_webdataset_reads_equal_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_shard(path, CLIPS, ARRAYS)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [one.key for one in CLIPS]
    for sample, one in zip(samples, CLIPS, strict=True):
        assert sample["json"] == one.meta
        for person, streams in one.people.items():
            for name, array in streams.items():
                found = sample[f"{person}.{name}.npy"]
                assert found.dtype == array.dtype
                assert np.array_equal(found, array)


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        info = write_shard(
            tmp_path / folder / "x.tar", (replace(one, people=dict(reversed(one.people.items()))) for one in CLIPS), ARRAYS[::-1]
        )
    assert (tmp_path / "one/x.tar").read_bytes() == (tmp_path / "two/x.tar").read_bytes()
    assert info == write_shard(tmp_path / "x.tar", CLIPS, ARRAYS)
    tar, index = (tmp_path / "x.tar").read_bytes(), (tmp_path / "x.index.npy").read_bytes()
    assert info == ShardInfo(len(CLIPS), len(tar), content_hash(tar), content_hash(index))


def test_index_ranges_are_the_tar_s_members(shard: tuple[Store, str, ShardInfo], tmp_path: Path) -> None:
    store, name, info = shard
    index, order, content = read_index(store, name, info.index), members(ARRAYS), store.read(f"{name}.tar")
    assert index.dtype == index_dtype(len(order))
    found = [f"{row['key'].decode()}.{member}" for row in index for member in order]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == found
        for row in index:
            for place, member in enumerate(order):
                expected = tar.extractfile(f"{row['key'].decode()}.{member}").read()
                assert content[row["offset"][place] :][: row["size"][place]] == expected


def test_a_damaged_index_is_named(shard: tuple[Store, str, ShardInfo]) -> None:
    store, name, info = shard
    content = bytearray(store.read(f"{name}.index.npy"))
    content[-1] ^= 1
    store.put(f"{name}.index.npy", bytes(content))
    with pytest.raises(CorruptData, match="shard train/000003, member index") as caught:
        read_index(store, name, info.index)
    assert caught.value.expected == info.index


@given(arrays(st.sampled_from([np.float16, np.float32, np.uint8, np.bool_, np.int64]), array_shapes(min_dims=0, max_dims=3, min_side=0)))
def test_npy_files_decode_to_what_numpy_reads(array: np.ndarray) -> None:
    data = encode_npy(array)
    ours, numpy_s = decode_npy(data), np.load(io.BytesIO(data), allow_pickle=False)
    assert ours.dtype == numpy_s.dtype and ours.shape == numpy_s.shape and ours.tobytes() == numpy_s.tobytes()


def test_npy_files_that_are_cut_pickled_or_foreign_are_refused(tmp_path: Path) -> None:
    data = encode_npy(np.arange(6))
    for cut in (b"", data[:5], data[:40], data[:-1], data + b"\0", b"PK" + data):
        with pytest.raises(ValueError, match="npy"):
            decode_npy(cut)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "columns.npy", np.asfortranarray(np.ones((2, 3))))
    for name in ("objects", "columns"):
        with pytest.raises(ValueError, match="only plain numbers"):
            decode_npy((tmp_path / f"{name}.npy").read_bytes())


def test_clips_that_do_not_fit_the_dataset_are_refused_by_name(tmp_path: Path) -> None:
    one = clip(1)
    del one.people["b"]["au"]
    for bad, rule in (
        (one, "clip clip-1 has the members"),
        (clip(2, key="a.b"), "clip key 'a.b'"),
        (clip(3, key="x" * 81), "clip key 'xxx"),
    ):
        with pytest.raises(ValueError, match=rule):
            write_shard(tmp_path / "x.tar", [bad], ARRAYS)
    with pytest.raises(ValueError, match="same key"):
        write_shard(tmp_path / "x.tar", [clip(1), clip(1)], ARRAYS)


def test_the_longest_names_still_fit(tmp_path: Path) -> None:
    longest = Clip("k" * 80, {person: {"n" * 13: np.zeros((50, 1), np.float16)} for person in "ab"})
    write_shard(tmp_path / "x.tar", [longest], ["n" * 13])
    shutil.unpack_archive(tmp_path / "x.tar", tmp_path / "out", filter="data")
    assert (tmp_path / "out" / f"{'k' * 80}.a.{'n' * 13}.npy").stat().st_size == 128 + 100
