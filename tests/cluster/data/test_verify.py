"""Is a dataset whole? Damage of every kind is found and named."""

import shutil
from pathlib import Path

import pytest

from cluster.config.schema import Workers
from cluster.data import sequential
from cluster.data.manifest import load_manifest
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData, read_index
from cluster.data.verify import check_shard, verify
from cluster.storage import StorageError, open_store
from reactdiff.clip import PERSONS
from tests.tiny import call

TAR = "train/000001.tar"


@pytest.fixture
def dataset(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def damage(dataset: Path) -> list[str]:
    """What is wrong with the second shard."""
    store = open_store(str(dataset))
    return [f"{each.file}: {each.what}" for each in check_shard((store, load_manifest(store)), "train", 1)]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("chunk", [1000, 1 << 24])
def test_a_flipped_bit_is_named_with_clip_member_and_both_checksums(dataset: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(sequential, "CHUNK", chunk)
    assert damage(dataset) == []
    store = open_store(str(dataset))
    manifest, index = load_manifest(store), read_index(store, TAR.removesuffix(".tar"))
    place = manifest.members.index("b.mfcc.npy")
    flip(dataset / TAR, int(index[3]["offset"][place]) + 200)
    (found,) = damage(dataset)
    assert found.startswith(f"{TAR}: clip {bytes(index[3]['key']).decode()}, member b.mfcc.npy: checksum ")
    assert found.endswith(f"but written with {index[3]['crc'][place]:08x}")


def test_damage_between_members_of_the_index_and_of_sizes_is_found(dataset: Path) -> None:
    flip(dataset / TAR, 0)
    assert "between its members: hash" in damage(dataset)[0]
    flip(dataset / TAR, 0)
    flip(dataset / "train/000001.index.npy", -1)
    assert "member index" in damage(dataset)[0]
    flip(dataset / "train/000001.index.npy", -1)
    content = (dataset / TAR).read_bytes()
    (dataset / TAR).write_bytes(content[:-512])
    assert f"it has {len(content) - 512} bytes, but was written with {len(content)}" in damage(dataset)[0]
    (dataset / TAR).unlink()
    assert "no such" in damage(dataset)[0].lower()
    (dataset / "train/000001.index.npy").unlink()
    assert damage(dataset)[0].startswith("train/000001.index.npy: ") and "no such" in damage(dataset)[0].lower()


def test_of_a_tar_that_ends_too_early_the_clips_are_named_that_a_reader_finds_damaged(dataset: Path) -> None:
    store = open_store(str(dataset))
    manifest, name = load_manifest(store), TAR.removesuffix(".tar")
    index, place = read_index(store, name), manifest.members.index("b.mfcc.npy")
    content = (dataset / TAR).read_bytes()
    (dataset / TAR).write_bytes(content[: int(index[3]["offset"][place]) + 5])
    first, wanted = int(manifest.counts("train")[0]), [(person, "mfcc") for person in PERSONS]
    reader, unreadable = Reader(store, manifest, "train"), []
    for row in range(len(index)):
        try:
            reader.read(first + row, wanted)
        except CorruptData as error:
            unreadable.append(error)
    assert [error.clip for error in unreadable] == [bytes(key).decode() for key in index["key"][3:]] and len(unreadable) > 1
    (found,) = damage(dataset)
    clips = f"clips {unreadable[0].clip} to {unreadable[-1].clip}, {len(unreadable)} in all, are not whole"
    assert f"was written with {len(content)}: {clips}" in found
    last = int(index[-1]["offset"][-1])
    (dataset / TAR).write_bytes(content[: last + 1])
    assert damage(dataset)[0].endswith(f"was written with {len(content)}: clip {unreadable[-1].clip} is not whole")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["tar", "index.npy", "appropriateness"])
def test_what_cannot_be_read_is_not_called_damaged(dataset: Path, kind: str) -> None:
    manifest = load_manifest(open_store(str(dataset)))
    part = manifest.split("test").appropriateness
    assert part is not None
    file = part.file if kind == "appropriateness" else f"test/000000.{kind}"
    (dataset / file).unlink()
    (dataset / file).symlink_to(dataset / file)
    with pytest.raises(StorageError, match=f"{file}: Too many levels of symbolic links"):
        verify(open_store(str(dataset)), manifest, Workers(), lambda done, total: None)


@pytest.mark.usefixtures("local_ray")
def test_the_job_prints_a_table_and_ends_with_1_if_anything_is_damaged(dataset: Path) -> None:
    flip(dataset / TAR, 2000)
    done = call("prepare", "verify", dataset, check=False)
    assert done.returncode == 1 and TAR in done.stdout and "restore these files" in done.stdout
