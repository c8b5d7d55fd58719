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

from cluster.config.schema import Workers
from cluster.data import sequential
from cluster.data.index_tars import IndexResult, index_tar, index_tars
from cluster.data.manifest import load_appropriateness, load_manifest
from cluster.data.prepare import prepare
from cluster.data.reader import Reader
from cluster.data.sequential import SequentialReader
from cluster.data.shards import index_dtype
from cluster.data.stream import Share
from cluster.data.tar_scan import ClipFormat, first_format, read_tar
from cluster.data.verify import verify
from cluster.storage import Store, open_store
from reactdiff.clip import PERSONS
from reactdiff.data.keyed import generator
from reactdiff.data.order import Order
from reactdiff.data.react2024 import Tree
from tests.cluster.support.streaming import make_clips, read_all, same
from tests.tiny import FRAMES

Files = list[tuple[str, bytes]]
"""Names and contents of a tar."""

WIDTHS = {"mfcc": 26, "attributes": 25, "coefficients": 58}
FORM = ClipFormat(50, WIDTHS)


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
            info.size, info.mtime = len(data), 1.5  # so that every member has a PAX header where there are any
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(content: bytes, folder: Path) -> tuple[np.ndarray, int]:
    store = open_store(str(folder))
    store.put("train/x.tar", content)
    return read_tar(SequentialReader(store, "train/x.tar", len(content)), FORM)


def run(store: Store, **kinds: Any) -> IndexResult:
    return index_tars(store, kinds, lambda done, total: None)


def clips(store: Store, split: str, digest: str = "") -> list[tuple[str, dict[tuple[str, str], np.ndarray]]]:
    """Key and arrays of every clip."""
    manifest = load_manifest(store, digest)
    reader, names = Reader(store, manifest, split), [*(stream.name for stream in manifest.streams), *manifest.targets]
    wanted = [(person, name) for person in PERSONS for name in names]
    return [(reader.key(clip), reader.read(clip, wanted).arrays) for clip in range(reader.clips)]


def alike(one: list, other: list) -> None:
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
    progress = []
    done = index_tars(store, {}, lambda *counts: progress.append(counts))
    ours, manifest = load_manifest(open_store(str(shards))), load_manifest(store)
    assert done == IndexResult(manifest, {"test": 8, "train": 20}, {"test": 2, "train": 20})
    assert progress[-1] == (6, 6)
    assert set(manifest.stream_specs) == set(ours.stream_specs) and manifest.frames == ours.frames and manifest.targets == ours.targets
    assert manifest.counts("train").tolist() == ours.counts("train").tolist()
    assert manifest.shard("train", 1) == "train/noxi-1"
    alike(clips(store, "train"), clips(open_store(str(shards)), "train"))
    found, expected = clips(store, "test"), clips(open_store(str(shards)), "test")
    assert all(key.startswith("a-folder-with") and len(key) == 80 for key, _ in found)
    for first, end in ((0, 6), (6, 8)):  # their members were written backwards, and with them the samples
        alike([("", streams) for _, streams in found[first:end]], [("", streams) for _, streams in expected[first:end][::-1]])
    assert verify(store, manifest, Workers(), lambda done, total: None) == []
    assert {key: store.read(key) for key in before} == before


@pytest.mark.usefixtures("local_ray")
def test_order_tensors_and_ledger_are_those_of_our_own_shards(tmp_path: Path) -> None:
    ours, theirs = open_store(str(tmp_path / "ours")), open_store(str(tmp_path / "theirs"))
    make_clips(ours, [6, 6, 2])
    rewritten(Path(ours.url), theirs)
    run(theirs)
    for rank in (0, 1):
        share = Share(batch=5, total=56, ranks=2, rank=rank)
        pairs = list(zip(read_all(theirs, share), read_all(ours, share), strict=True))
        assert len(pairs) == 12 and all(same(*pair) for pair in pairs) and any(batch.ledger for batch, _ in pairs)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, local_ray: object) -> Path:
    """An indexed dataset of two tars of two clips and one of one, and a matrix; to be copied."""
    store = open_store(str(tmp_path_factory.mktemp("small") / "tars"))
    store.put("train/m.tar", tarred(files("one", "two")))
    store.put("train/p.tar", tarred(files("three", "four")))
    store.put("val/x.tar", tarred(files("five")))
    store.put("val/appropriateness.npy", npy(np.eye(2, dtype=bool)))
    run(store)
    return Path(store.url)


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Store:
    return open_store(str(shutil.copytree(small, tmp_path / "tars")))


def everything(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list()}


def test_the_same_tars_again_change_nothing(copied: Store) -> None:
    before = everything(copied)
    again = run(copied)
    assert again == IndexResult(load_manifest(copied), {"train": 0, "val": 0}, {"train": 0, "val": 0})
    assert everything(copied) == before


def test_a_tar_that_was_read_is_not_read_again_and_one_that_changed_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("train/x.tar", content := tarred(files("one", "two")))
    first = index_tar((store, FORM), "train/x", len(content))
    assert first.info.clips == 2
    store.delete("train/x.tar")
    assert index_tar((store, FORM), "train/x", len(content)) == first
    with pytest.raises(ValueError, match=rf"train/x.tar has 7 bytes, but had {len(content)} when it was read; tars must not change"):
        index_tar((store, FORM), "train/x", 7)
    store.put("train/x.tar", other := tarred(files("three", "two")))
    store.delete("train/x.indexed.json")
    with pytest.raises(ValueError, match=r"train/x.index.npy is there, but is not the index of train/x.tar"):
        index_tar((store, FORM), "train/x", len(other))


def test_an_interrupted_index_goes_on_to_the_same_dataset(small: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "tars"))
    for key in ("train/m.tar", "train/p.tar", "val/x.tar", "val/appropriateness.npy"):
        store.put(key, (small / key).read_bytes())

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_tars(store, {}, interrupt)
    assert not store.exists("dataset.json")
    assert run(store).manifest.hash == load_manifest(open_store(str(small))).hash


def test_new_tars_come_behind_the_old_and_who_is_pinned_to_the_old_state_sees_nothing_of_them(copied: Store) -> None:
    first = load_manifest(copied)
    reader = Reader(copied, first, "train")
    before, order = clips(copied, "train", first.hash), Order(2 * first.counts("train"), seed=0, block=4, group=4)
    copied.put("train/a.tar", tarred(files("six", "seven")))
    grown = run(copied)
    assert grown.added == {"train": 2, "val": 0}
    assert grown.manifest.split("train").shards.number == ["m", "p", "a"]
    assert [key for key, _ in clips(copied, "train")] == ["one", "two", "three", "four", "six", "seven"]
    assert grown.manifest.identity == first.hash != grown.manifest.hash == load_manifest(copied).hash
    pinned = load_manifest(copied, first.hash)
    assert pinned == first and [reader.key(clip) for clip in range(reader.clips)] == ["one", "two", "three", "four"]
    alike(clips(copied, "train", first.hash), before)
    positions = np.arange(40)
    assert np.array_equal(Order(2 * pinned.counts("train"), seed=0, block=4, group=4).at(positions), order.at(positions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda store: store.delete("train/p.tar"), r"train/p\.tar is missing, but the dataset has it with \d+ bytes, and shards never"),
        (lambda store: store.put("train/p.tar", b"0"), r"train/p\.tar has 1 bytes, but the dataset has it with \d+ bytes"),
        (lambda store: store.put("test/q.tar", store.read("train/p.tar")), r"train/p\.tar and test/q\.tar are the same, byte for byte"),
        (lambda store: store.put("train/q.tar.gz", b""), r"train/q\.tar\.gz is compressed, so nothing can be read from its middle"),
        (lambda store: store.put("train/more/q.tar", b""), r"train/more/q\.tar: the tars of a dataset lie at <split>/<name>\.tar"),
        (lambda store: store.put("q.tar", b""), r"/q\.tar: the tars of a dataset lie at <split>/<name>\.tar"),
        (
            lambda store: store.put("train/q.tar", tarred(files("six")[1:])),
            r"train/q\.tar: clip six, member a\.mfcc\.npy: the clip lacks it",
        ),
        (
            lambda store: store.put("val/q.tar", tarred(files("six"))),
            r"val/appropriateness\.npy holds bool \(2, 2\), but the 2 clips of the split need bool \(4, 4\): all clips in their order",
        ),
        (
            lambda store: store.put("val/appropriateness.npy", npy(np.array([[True, False], [False, False]]))),
            r"val/appropriateness\.npy: 1 rows have no True, the first is row 1",
        ),
        (lambda store: store.put("val/appropriateness.npy", b"x" * 99), r"val/appropriateness\.npy: the bytes are no \.npy file"),
    ],
)
def test_what_is_refused_publishes_nothing(copied: Store, change: Callable[[Store], None], message: str) -> None:
    before = copied.read("dataset.json")
    change(copied)
    with pytest.raises(ValueError, match=message):
        run(copied)
    assert copied.read("dataset.json") == before


def test_a_matrix_is_kept_by_its_hash_and_may_be_replaced_when_the_split_grows(copied: Store) -> None:
    first = load_manifest(copied)
    assert load_appropriateness(copied, first, "train") is None
    copied.put("val/q.tar", tarred(files("six")))
    copied.put("val/appropriateness.npy", npy(matrix := np.eye(4, dtype=bool)[::-1]))
    assert np.array_equal(load_appropriateness(copied, run(copied).manifest, "val"), matrix)
    assert np.array_equal(load_appropriateness(copied, first, "val"), np.eye(2, dtype=bool))


def test_a_stream_of_no_known_class_is_asked_for_and_never_changes_it(tmp_path: Path, local_ray: object) -> None:
    store = open_store(str(tmp_path))
    streams = [(f"one.{p}.gaze-and-pupils.npy", npy(np.zeros((50, 4), np.float16))) for p in PERSONS]
    store.put("train/x.tar", tarred([*files("one"), *streams]))
    with pytest.raises(ValueError, match="is gaze-and-pupils a stream of the face or of the voice"):
        run(store)
    with pytest.raises(ValueError, match=r"--facial gaze: the tars at .* have no such stream; they have gaze-and-pupils, mfcc"):
        index_tars(store, {"gaze": "facial"}, lambda done, total: None)
    assert [entry.key for entry in store.list()] == ["train/x.tar"]
    done = index_tars(store, {"gaze-and-pupils": "facial"}, lambda done, total: None)
    assert [(spec.name, spec.kind, spec.width) for spec in done.manifest.stream_specs] == [
        ("gaze-and-pupils", "facial", 4),
        ("mfcc", "acoustic", 26),
    ]
    assert run(store).manifest == done.manifest
    with pytest.raises(ValueError, match=r"--acoustic gaze-and-pupils: the dataset at .* has it as facial, and that never changes"):
        index_tars(store, {"gaze-and-pupils": "acoustic"}, lambda done, total: None)


def test_a_dataset_is_either_prepared_or_indexed(shards: Path, copied: Store, tmp_path: Path) -> None:
    ours = open_store(str(shards))
    with pytest.raises(ValueError, match="was prepared from a tree, and grows with it"):
        run(ours)
    tree = Tree(shards.parent / "tree")
    with pytest.raises(ValueError, match=f"the dataset at {copied.url} has frames 50, but the tree has {FRAMES}"):
        prepare(tree, copied, clips_per_shard=4, strict=False, progress=lambda done, total: None)
    rewritten(shards, theirs := open_store(str(tmp_path / "theirs")))
    with pytest.raises(ValueError, match="there are no tars at"):
        run(open_store(str(tmp_path / "nothing")))
    run(theirs)
    with pytest.raises(ValueError, match=f"the dataset at {theirs.url} has (streams|members)"):
        prepare(tree, theirs, clips_per_shard=4, strict=False, progress=lambda done, total: None)


def test_the_index_is_where_the_arrays_are_in_any_order_and_kind_of_tar_and_across_the_parts_it_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "CHUNK", 1024)
    contents = [*files("./a/clip")[::-1], ("./a/clip.a.video.mp4", b"frames"), ("._x", b"!"), *files("ünïcode " + "x" * 150), ("dot.", b"")]
    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        some = contents if kind != tarfile.USTAR_FORMAT else contents[:8]
        content = tarred(some, format=kind)
        rows, ignored = read(content, tmp_path / str(number))
        assert rows["key"][0] == b"a__clip" and ignored == len(some) - 6 * len(rows)
        assert len(rows) == (1 if kind == tarfile.USTAR_FORMAT else 2)
        expected = dict(some)
        for row, path in zip(rows, ("./a/clip", "ünïcode " + "x" * 150), strict=False):
            for place, member in enumerate(FORM.members):
                offset, size = int(row["offset"][place]), int(row["size"][place])
                assert content[offset : offset + size] == expected[f"{path}.{member}"]


def replaced(key: str, member: str, data: bytes) -> Files:
    return [(name, data if name == f"{key}.{member}" else old) for name, old in files("one", "two")]


ONE, TWO = files("one"), files("two")
NAN, INF = arrays("two")["a.mfcc.npy"], arrays("two")["b.coefficients.npy"]
NAN[17, 3], INF[49, 57] = np.nan, np.inf
GOOD = arrays("two")["a.mfcc.npy"]
UNPADDED = npy(GOOD)[:8] + (117).to_bytes(2, "little") + npy(GOOD)[10:126] + b"\n" + npy(GOOD)[128:]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            replaced("two", "a.mfcc.npy", npy(GOOD.astype(np.float32))),
            r"two, member a\.mfcc\.npy: it is float32 \(50, 26\), but must be float16",
        ),
        (replaced("two", "a.mfcc.npy", npy(GOOD.astype(">f2"))), r"a\.mfcc\.npy: it is >f2 \(50, 26\), but must be float16 \(50, 26\)"),
        (replaced("two", "a.mfcc.npy", npy(GOOD[:, :20])), r"a\.mfcc\.npy: it is float16 \(50, 20\), but must be float16 \(50, 26\)"),
        (replaced("two", "a.mfcc.npy", npy(GOOD[:49])), r"a\.mfcc\.npy: it is float16 \(49, 26\), but must be"),
        (replaced("two", "a.mfcc.npy", npy(np.asfortranarray(GOOD))), r"a\.mfcc\.npy: its \.npy header .*Fortran order"),
        (replaced("two", "a.mfcc.npy", npy(GOOD, (2, 0))), r"a\.mfcc\.npy: it must be a \.npy file of version 1\.0, but has version 2\.0"),
        (replaced("two", "a.mfcc.npy", npy(GOOD)[:90]), r"a\.mfcc\.npy: its \.npy header cannot be used"),
        (replaced("two", "a.mfcc.npy", npy(GOOD)[:-2]), r"a\.mfcc\.npy: it has 2726 bytes, but float16 \(50, 26\) needs 2728"),
        (replaced("two", "a.mfcc.npy", UNPADDED), r"a\.mfcc\.npy: its \.npy header has 127 bytes, but must have a multiple of 16"),
        (replaced("two", "a.mfcc.npy", b"PK"), r"a\.mfcc\.npy: it must be a \.npy file of version 1\.0, but is something else"),
        (replaced("two", "a.mfcc.npy", npy(NAN)), r"a\.mfcc\.npy: row 17, column 3 is nan; all numbers must be finite"),
        (replaced("two", "b.coefficients.npy", npy(INF)), r"b\.coefficients\.npy: row 49, column 57 is inf"),
        (
            [*ONE, *TWO[:2], *TWO[3:]],
            r"clip two, member a\.coefficients\.npy: the clip lacks it, and has a\.attributes\.npy, a\.mfcc",
        ),
        ([*ONE, *TWO, TWO[0]], r"clip two, member a\.mfcc\.npy: the clip has it twice; correct the clip or leave it out"),
        ([*ONE[:3], *TWO, *ONE[3:]], r"clip one, member b\.attributes\.npy: the clip lacks it"),
        ([*ONE, *TWO, *ONE], r"clip one, member a\.mfcc\.npy: its clip was there before: members must lie side by side"),
        ([*files("a b"), *files("a-b")], r"clip a-b, member a\.mfcc\.npy: its clip was there before"),
        ([*ONE, ("two.json", b"{}")], r"clip two, member a\.attributes\.npy: the clip lacks it, and has no array at all"),
        (
            [*ONE, *TWO, ("two.a.au.npy", npy(GOOD))],
            r"clip two, member a\.au\.npy: the first clip of the dataset has no such array, only attr",
        ),
        ([], " has no clips"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused_with_tar_clip_member_and_rule(tmp_path: Path, contents: Files, message: str) -> None:
    with pytest.raises(ValueError, match=rf"train/x\.tar.*{message}"):
        read(tarred(contents), tmp_path)


def broken(content: bytes) -> Iterator[tuple[str, bytes, str]]:
    half = content.index(b"two.a.mfcc.npy")
    yield "cut off in a member", content[: half + 1000], "is no whole tar .it ends inside two.a.mfcc.npy"
    yield "cut off in a header", content[: half + 100], f"from byte {half} on, are not the zeros that end a tar"
    yield "cut off between two clips", content[:half], f"behind its last readable member, from byte {half} on, are not the zeros"
    yield "a damaged header", content[: half + 5] + b"!" + content[half + 6 :], f"from byte {half} on, are not the zeros that end a tar"
    yield "two joined with cat", content + content, "are not the zeros that end a tar; it was cut off, or damaged there, or put together"
    yield "gzip under another name", gzip.compress(content), "is no whole tar .*write it again, without compression"
    yield "no tar", b"no tar" * 1000, "is no whole tar"


@pytest.mark.parametrize(
    ("content", "message"),
    [pytest.param(*case[1:], id=case[0]) for case in broken(tarred(files("one", "two"), format=tarfile.USTAR_FORMAT))],
)
def test_a_tar_that_is_not_whole_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"train/x\.tar.*({message})"):
        read(content, tmp_path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        link = tarfile.TarInfo("one.a.mfcc.npy")
        link.type, link.linkname = tarfile.LNKTYPE, "zero.a.mfcc.npy"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"clip one, member a\.mfcc\.npy: it is a link, or a file with holes, but must be plain"):
        read(file.getvalue(), tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            [("one.a.mfcc.npy", npy(np.zeros((75, 26), np.float16)))],
            r"member a\.mfcc\.npy: it is of shape \(75, 26\), .* multiple of 50 frames",
        ),
        ([("one.a.mfcc.npy", npy(np.zeros(50, np.float16)))], r"it is of shape \(50,\), but must be \(frames, width\)"),
        ([("one.json", b"{}"), *files("two")], r"its first sample has no member <key>\.<person>\.<stream>\.npy, person a or b"),
    ],
)
def test_the_first_clip_must_be_of_a_form_that_a_dataset_can_have(tmp_path: Path, contents: Files, message: str) -> None:
    store, content = open_store(str(tmp_path)), tarred(contents)
    store.put("train/x.tar", content)
    with pytest.raises(ValueError, match=message):
        first_format(SequentialReader(store, "train/x.tar", len(content)))


def test_a_tar_costs_its_index_and_a_few_megabytes_whatever_is_in_it(tmp_path: Path) -> None:
    form = ClipFormat(1000, {"w2v": 20_000, "attributes": 25, "coefficients": 58})
    members = {f"one.{p}.{name}.npy": npy(np.zeros(*form.array(name))) for p in PERSONS for name in form.widths}
    store, content = open_store(str(tmp_path)), tarred([*members.items(), ("one.mp4", bytes(50_000_000))])
    store.put("train/x.tar", content)
    size = len(content)
    del content, members
    tracemalloc.start()
    try:
        rows, _ = read_tar(SequentialReader(store, "train/x.tar", size), form)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.dtype == index_dtype(6) and size > 130_000_000 and peak < 3 * sequential.CHUNK
