"""What indexing promises of tars that others wrote: they are the dataset, nothing that does not fit is published, and it only grows."""

import gzip
import io
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from cluster import tape
from cluster.config import Workers
from cluster.foreign import Form, first_form, read_tar
from cluster.index import Indexed, index, index_tar
from cluster.manifest import load_appropriateness, load_manifest
from cluster.prepare import prepare
from cluster.reader import Reader
from cluster.shards import decode_npy, index_dtype
from cluster.storage import Store, open_store
from cluster.tape import Tape
from cluster.verify import verify
from reactdiff.clip import PERSONS
from reactdiff.data.keyed import generator
from reactdiff.data.order import Order
from reactdiff.data.react2024 import Tree
from tests.cluster.training import train_on
from tests.tiny import FRAMES, tiny

Files = list[tuple[str, bytes]]
"""Names and contents of a tar."""

WIDTHS = {"mfcc": 26, "attributes": 25, "coefficients": 58}
FORM = Form(50, WIDTHS)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def arrays(key: str, frames: int = 50) -> dict[str, np.ndarray]:
    """A clip by member."""
    rng = generator("foreign clip", key)
    kinds = {name: np.float16 if name == "mfcc" else np.float32 for name in WIDTHS}
    return {f"{p}.{name}.npy": rng.standard_normal((frames, width)).astype(kinds[name]) for p in PERSONS for name, width in WIDTHS.items()}


def files(*keys: str) -> Files:
    return [(f"{key}.{member}", npy(array)) for key in keys for member, array in arrays(key).items()]


def tarred(contents: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in contents:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(content: bytes, folder: Path) -> tuple[np.ndarray, int]:
    store = open_store(str(folder))
    store.put("train/x.tar", content)
    return read_tar(Tape(store, "train/x.tar", len(content)), FORM)


def run(store: Store, **kinds: Any) -> Indexed:
    return index(store, kinds, lambda done, total: None)


def clips(store: Store, split: str, digest: str = "") -> list[tuple[str, dict[tuple[str, str], np.ndarray]]]:
    """Key and arrays of every clip."""
    manifest = load_manifest(store, digest)
    reader, names = Reader(store, manifest, split), [*(stream.name for stream in manifest.streams), *manifest.targets]
    wanted = [(person, name) for person in PERSONS for name in names]
    return [(reader.key(clip), reader.read(clip, wanted).arrays) for clip in range(reader.clips)]


def same(one: list, other: list) -> None:
    assert [key for key, _ in one] == [key for key, _ in other]
    for (_, ours), (_, theirs) in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours)


def rewritten(shards: Path, store: Store) -> None:
    """The samples of a dataset of ours in tars of other writers, under other names: with one shard of theirs for one of ours."""
    ours = open_store(str(shards))
    manifest = load_manifest(ours)
    for split in manifest.splits:
        every, first = clips(ours, split), 0
        for number, count in enumerate(manifest.counts(split)):
            samples, first = every[first : first + count], first + int(count)
            file = io.BytesIO()
            if split == "train":
                with webdataset.TarWriter(file) as writer:  # which sorts a sample's members, so the file lies between the persons
                    for key, streams in samples:
                        members = {f"{person}.{name}.npy": array for (person, name), array in streams.items()}
                        writer.write({"__key__": key, "a.video.mp4": b"frames" * 1000} | members)
                content = file.getvalue()
            else:
                folder = "./a folder with a name that is so long that a plain header of a tar does not have room for it/" * 2
                members = [(f"{folder}{key}.{p}.{n}.npy", npy(array)) for key, streams in samples for (p, n), array in streams.items()]
                content = tarred([*members[::-1], ("README", b"no sample")], format=tarfile.GNU_FORMAT)
            store.put(f"{split}/{'part ' if split == 'test' else 'noxi-'}{number}.tar", content)


@pytest.mark.usefixtures("local_ray")
def test_tars_of_other_writers_read_as_the_arrays_they_were_written_from(store: Store, shards: Path) -> None:
    rewritten(shards, store)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    seen = []
    done = index(store, {}, lambda *counts: seen.append(counts))
    ours, manifest = load_manifest(open_store(str(shards))), load_manifest(store)
    assert done == Indexed(manifest, {"test": 8, "train": 20}, {"test": 2, "train": 20})
    assert seen[-1] == (6, 6)
    assert set(manifest.stream_specs) == set(ours.stream_specs) and manifest.frames == ours.frames and manifest.targets == ours.targets
    assert manifest.counts("train").tolist() == ours.counts("train").tolist()
    assert manifest.shard("train", 1) == "train/noxi-1"
    same(clips(store, "train"), clips(open_store(str(shards)), "train"))
    found, expected = clips(store, "test"), clips(open_store(str(shards)), "test")
    assert all(key.startswith("a-folder-with") and len(key) == 80 for key, _ in found)
    for first, end in ((0, 6), (6, 8)):  # their members were written backwards, and with them the samples
        same([("", streams) for _, streams in found[first:end]], [("", streams) for _, streams in expected[first:end][::-1]])
    assert verify(store, manifest, Workers(), lambda done, total: None) == []
    assert {key: store.read(key) for key in before} == before
