"""What a manifest promises: it is what its name says, it grows without losing itself, and 10^5 shards cost nearly nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.data.manifest import Manifest, ShardTable, Split, StreamEntry, current_manifest, load_appropriateness, load_manifest, publish
from cluster.data.shards import ShardInfo, encode_npy, members
from cluster.storage import AlreadyExists, Stale, Store, content_hash, open_store
from reactdiff.data.sample import StreamSpec

HASHES = [content_hash(b"%d" % number) for number in range(4)]


def manifest(**changes) -> Manifest:
    shards = ShardTable().plus({0: ShardInfo(3, 100, *HASHES[:2]), 7: ShardInfo(2, 90, *HASHES[2:])})
    fields = {
        "kind": "clips",
        "frames": 50,
        "streams": [StreamEntry(name="mfcc", kind="acoustic", width=26)],
        "targets": {"attributes": 25, "coefficients": 58},
        "members": list(members(["mfcc", "attributes", "coefficients"])),
        "splits": {"train": Split(shards=shards)},
    }
    return Manifest(**fields | changes)


def test_what_was_published_is_loaded_by_hash_and_as_the_current_one(store: Store) -> None:
    first = manifest()
    publish(store, first)
    loaded, etag = current_manifest(store)
    assert loaded == load_manifest(store, first.hash) == load_manifest(store)
    assert loaded.hash == loaded.identity == first.hash
    assert loaded.stream_specs == (StreamSpec("mfcc", "acoustic", 26),)
    assert loaded.counts("train").tolist() == [3, 2]
    assert [loaded.shard("train", position) for position in range(2)] == ["train/000000", "train/000007"]
    assert loaded.split("train").shards.info(1) == ShardInfo(2, 90, *HASHES[2:])
    second = manifest(origin=first.hash, provenance={"grown": True})
    publish(store, second, etag)
    assert load_manifest(store) == second
    assert load_manifest(store, first.hash) == first
    assert load_manifest(store).identity == first.hash


def test_of_two_publishers_the_later_is_refused(store: Store) -> None:
    publish(store, manifest())
    _, etag = current_manifest(store)
    with pytest.raises(AlreadyExists):
        publish(store, manifest(frames=100))
    publish(store, manifest(frames=150), etag)
    with pytest.raises(Stale):
        publish(store, manifest(frames=200), etag)
    assert load_manifest(store).frames == 150


def test_the_hash_is_that_of_the_bytes_and_independent_of_field_order(store: Store) -> None:
    one = manifest(provenance={"a": 1, "b": [True, None]})
    other = Manifest.model_validate(dict(reversed(one.model_dump().items())) | {"provenance": {"b": [True, None], "a": 1}})
    assert one.hash == other.hash != manifest().hash
    publish(store, one)
    assert content_hash(store.read(f"manifest-{one.hash}.json")) == one.hash


def test_a_manifest_of_ours_has_the_hash_it_always_had() -> None:
    assert manifest().hash == "1d1f926de89fdb5e2338e0f1328f9b5a"


def test_a_shard_that_another_program_wrote_has_the_name_it_was_found_with(store: Store) -> None:
    names = ["000001", "noxi part", "7"]
    shards = ShardTable().plus({name: ShardInfo(3, 100, *HASHES[:2]) for name in names})
    publish(store, manifest(splits={"train": Split(shards=shards)}))
    loaded = load_manifest(store)
    assert [loaded.shard("train", position) for position in range(3)] == [f"train/{name}" for name in names]


def test_no_dataset_is_an_error_that_names_the_url_and_the_command(store: Store) -> None:
    with pytest.raises(ValueError, match=f"no dataset at {store.url} .*jobs/prepare.py react2024 TREE {store.url}"):
        load_manifest(store)
    publish(store, manifest())
    with pytest.raises(ValueError, match=f"{store.url} has no state {'0' * 32}"):
        load_manifest(store, "0" * 32)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    publish(store, one := manifest())
    path = tmp_path / f"manifest-{one.hash}.json"
    path.write_bytes(path.read_bytes().replace(b'"frames":50', b'"frames":51'))
    with pytest.raises(ValueError, match=f"{path} has hash"):
        load_manifest(store)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dataset\.json should be"):
        load_manifest(store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2, "new_field": 1}, "version is 2; this program reads version 1: use the release that wrote it"),
        ({"frames": "many"}, "frames is 'many'"),
        ({"splits": {"train": {"shards": {"number": [1]}}}}, "columns of the shard list have different lengths"),
    ],
)
def test_manifests_of_other_versions_or_shapes_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    data = json.dumps(manifest().model_dump() | changes).encode()
    digest = content_hash(data)
    (tmp_path / f"manifest-{digest}.json").write_bytes(data)
    with pytest.raises(ValueError, match=f"manifest-{digest}.json: .*{message}"):
        load_manifest(open_store(str(tmp_path)), digest)


def test_an_unknown_split_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no split 'valid'; it has train"):
        manifest().split("valid")


def test_an_appropriateness_matrix_is_the_one_the_manifest_names(store: Store) -> None:
    matrix = np.eye(10, dtype=bool)
    data = encode_npy(matrix)
    store.put("train/appropriateness.npy", data)
    part = {"file": "train/appropriateness.npy", "hash": content_hash(data)}
    one = manifest(splits={"train": Split(shards=ShardTable(), appropriateness=part), "val": Split(shards=ShardTable())})
    assert np.array_equal(load_appropriateness(store, one, "train"), matrix)
    assert load_appropriateness(store, one, "val") is None
    store.put("train/appropriateness.npy", encode_npy(~matrix))
    with pytest.raises(ValueError, match=f"{store.url}/train/appropriateness.npy has hash"):
        load_appropriateness(store, one, "train")


MEASURE = """
import sys, time
from cluster.data.manifest import load_manifest
from cluster.storage import open_store
from tests.memory import kilobytes
store, before, start = open_store(sys.argv[1]), kilobytes("VmRSS"), time.process_time()
manifest = load_manifest(store)
assert manifest.counts("train").sum() == 10**8 and manifest.shard("train", 99_999) == sys.argv[2]
print(time.process_time() - start, (kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.starts
def test_a_dataset_of_100_000_shards_is_open_in_2_seconds_and_64_megabytes(tmp_path: Path, named: bool) -> None:
    count = 100_000
    digests = "".join(content_hash(number.to_bytes(4)) for number in range(count))
    names = [f"recordings-of-a-long-name-{number:06d}" if named else number for number in range(count)]
    columns = {"number": names, "clips": [1000] * count, "bytes": list(range(10**9, 10**9 + count))}
    one = manifest(splits={"train": Split(shards=ShardTable(**columns, tar=digests, index=digests))})
    publish(open_store(str(tmp_path)), one)
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), one.shard("train", count - 1)]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 2 and megabytes < 64, done.stdout
    print(f"{seconds:.2f} s, {megabytes:.0f} MB")
