"""What every store promises, on a folder and on a real S3 server."""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.storage import AlreadyExists, NotFound, Stale, StorageError, Store, folder, open_store
from cluster.storage.base import FORGOTTEN, probe_key
from cluster.storage.folder import ABANDONED, STAGED, FolderStore
from tests.cluster.support.streaming import read_range
from tests.cluster.support.writes import WRITES, watch_writes


def race(racers: int, attempt) -> list:
    """What each racer's attempt returned or raised, all let go at once."""
    start = threading.Barrier(racers)

    def run(number: int):
        start.wait()
        try:
            return attempt(number)
        except StorageError as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        return list(pool.map(run, range(racers)))


def test_what_was_put_is_read_whole_and_in_ranges(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 300
    store.put("a/b c/d", content)
    (tmp_path / "local").write_bytes(content[::-1])
    store.put_file("a/file", tmp_path / "local")
    assert store.read("a/b c/d") == content
    assert store.read("a/file") == content[::-1]
    assert read_range(store, "a/b c/d", 1000, 77) == content[1000:1077]
    assert read_range(store, "a/b c/d", 5, 0) == b""
    buffer = bytearray(20)
    store.read_into("a/b c/d", 300, memoryview(buffer)[4:12])
    assert buffer == bytes(4) + content[300:308] + bytes(8)
    assert store.size("a/file") == len(content)
    assert store.exists("a/file") and not store.exists("a") and not store.exists("nothing")


def test_put_overwrites_and_delete_forgives(store: Store) -> None:
    store.put("x", b"one")
    store.put("x", b"")
    assert store.get("x")[0] == b""
    store.delete("x")
    store.delete("x")
    assert not store.exists("x")


def test_bytes_read_are_counted_over_a_store_and_its_sub_stores(store: Store) -> None:
    store.put("sub/x", b"0123456789")
    below = store.at("sub")
    below.read("x")
    read_range(store, "sub/x", 2, 3)
    assert store.bytes_read == below.bytes_read == 13


def test_list_is_sorted_by_bytes_and_respects_the_prefix(store: Store) -> None:
    keys = ["a/b", "a.b", "a/b.c", "ab", "a/é", "a/z/1", "a/z/10", "a/z/2", "z"]
    for key in keys:
        store.put(key, key.encode())
    assert [entry.key for entry in store.list()] == sorted(keys, key=str.encode)
    assert [entry.key for entry in store.list("a/z/1")] == ["a/z/1", "a/z/10"]
    assert [tuple(entry) for entry in store.at("a").list("b")] == [("b", 3), ("b.c", 5)]
    assert list(store.list("none/")) == []


def test_a_store_travels_to_other_processes_as_its_url(store: Store) -> None:
    store.put("sub/x", b"content")
    text = pickle.dumps(store.at("sub"))
    assert len(text) < 300
    assert pickle.loads(text).read("x") == b"content"
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret").encode() not in text


def test_of_racing_creators_exactly_one_wins_and_its_content_stays(store: Store) -> None:
    for round_ in range(3):
        results = race(4, lambda number, round_=round_: (number, store.create(f"r{round_}", b"%d" % number)))
        winners = [result for result in results if isinstance(result, tuple)]
        assert len(winners) == 1, results
        assert sum(isinstance(result, AlreadyExists) for result in results) == 3
        assert store.get(f"r{round_}") == (b"%d" % winners[0][0], winners[0][1])


def test_of_racing_replacers_exactly_one_wins_and_its_content_stays(store: Store) -> None:
    etag = store.create("state", b"start")
    for round_ in range(3):
        results = race(4, lambda number, round_=round_, etag=etag: (number, store.replace("state", b"%d %d" % (round_, number), etag)))
        winners = [result for result in results if isinstance(result, tuple)]
        assert len(winners) == 1, results
        assert sum(isinstance(result, Stale) for result in results) == 3
        etag = winners[0][1]
        assert store.get("state") == (b"%d %d" % (round_, winners[0][0]), etag)


def test_replacing_what_is_gone_is_stale(store: Store) -> None:
    etag = store.create("x", b"1")
    store.delete("x")
    with pytest.raises(Stale, match="x"):
        store.replace("x", b"2", etag)
    assert not store.exists("x")


def test_a_good_store_proves_itself_and_leaves_nothing(store: Store) -> None:
    store.assert_conditional_writes()
    assert list(store.list()) == []


@pytest.mark.parametrize("forgets", ["create", "replace"])
def test_a_store_that_ignores_conditions_is_refused(tmp_path: Path, forgets: str) -> None:
    def ignore(self: FolderStore, key: str, data: bytes, *_: str) -> str:
        self.put(key, data)
        return self.get(key)[1]

    forgetful = type("Forgetful", (FolderStore,), {forgets: ignore})(tmp_path)
    with pytest.raises(StorageError, match=f"{tmp_path}: conditional puts are ignored.*If-None-Match"):
        forgetful.assert_conditional_writes()
    assert list(forgetful.list()) == []


def test_errors_name_the_url_and_the_cause(store: Store) -> None:
    for attempt in (store.read, store.get, store.size, lambda key: read_range(store, key, 0, 1)):
        with pytest.raises(NotFound, match=f"{store.url}/no/thing.*no such object"):
            attempt("no/thing")
    store.put("short", b"abc")
    for start in (1, 100):
        with pytest.raises(StorageError, match=f"{store.url}/short") as caught:
            read_range(store, "short", start, 10)
        assert not isinstance(caught.value, NotFound)
    with pytest.raises(AlreadyExists, match=f"{store.url}/short"):
        store.create("short", b"")
    pickle.loads(pickle.dumps(caught.value))


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\nb", "a/.~b"])
def test_keys_that_leave_the_store_or_are_no_names_are_refused(store: Store, key: str) -> None:
    for attempt in (store.read, store.size, store.delete, store.at, lambda key: store.put(key, b"")):
        with pytest.raises(ValueError, match="is no key of a store"):
            attempt(key)


@pytest.mark.parametrize("url", ["", "http://host/x", "s3://", "file://host/x", "s3://bucket/x?y"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no store"):
        open_store(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_store("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)


def test_folder_urls_name_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("some where").put("x", b"1")
    assert open_store(f"file://{tmp_path}/some%20where").read("x") == b"1"
    assert open_store("some where").url == str(tmp_path / "some where")
    assert open_store("some where").node_local


@pytest.mark.starts
def test_a_writer_killed_in_the_middle_leaves_the_old_content_and_nothing_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys\n"
        "from cluster.storage import open_store\n"
        "open_store(sys.argv[1]).put('x', b'old')\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "open_store(sys.argv[1]).put('x', b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    (left,) = tmp_path.glob(".~*")  # the fault happened
    store = open_store(str(tmp_path))
    assert [tuple(entry) for entry in store.list()] == [("x", 3)]
    assert store.read("x") == b"old"
    store.put("y", b"another process writes beside it")
    assert left.exists(), "it may be alive"
    monkeypatch.setitem(folder._last_cleanup, tmp_path, left.stat().st_mtime - ABANDONED - 1)  # as if that had been an hour ago
    lock, living = tmp_path / ".~lock", left.with_name(f"{left.name}2")
    for path, age in {left: ABANDONED + 5, lock: 2 * ABANDONED, living: ABANDONED - 60}.items():
        path.touch()
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    store.put("y", b"the same process writes again")
    assert sorted(tmp_path.iterdir()) == sorted([lock, living, tmp_path / "x", tmp_path / "y"])


def test_every_write_of_a_store_is_watched_where_tests_kill_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    watch_writes(seen.append, patch=monkeypatch.setattr)
    store, large = open_store(str(tmp_path)), tmp_path / "large"
    etag = store.create("a", b"1")
    store.replace("a", b"2", etag)
    store.put("b", b"3")
    large.write_bytes(b"4")
    store.put_file("c", large)
    store.delete("c")
    store.delete_unfinished()
    assert {line.partition(" ")[0] for line in seen} == WRITES
    assert seen[0] == f"create {tmp_path}/a" and seen[-1] == f"delete_unfinished {tmp_path}/"


def test_what_a_killed_writer_left_can_be_removed_at_once_and_what_this_process_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "deep" / f"{STAGED}killed"
    killed.parent.mkdir()
    killed.touch()
    store, sync = open_store(str(tmp_path)), os.fsync

    def meanwhile(descriptor: int) -> None:
        store.at("deep").delete_unfinished()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    store.put("deep/x", b"whole")
    assert [path.name for path in killed.parent.iterdir()] == ["x"] and store.read("deep/x") == b"whole"


def test_a_missing_bucket_and_a_wrong_secret_fail_at_once_without_a_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'nobody-made-this'") as caught:
        open_store("s3://nobody-made-this/x").create("a", b"")
    assert not isinstance(caught.value, NotFound)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageError, match=f"{s3_url}/a at http://.*403") as caught:
        open_store(s3_url).read("a")
    assert "hunter2" not in str(caught.value)


def test_what_killed_processes_left_of_their_probes_goes_a_day_later(store: Store) -> None:
    old, young = (probe_key(store, lambda now=now: now) for now in (1_000.0, 50_000.0))
    store.put(old, b"")
    store.put(young, b"")
    store.put("probes/somebody-else", b"")
    another = probe_key(store, lambda: 1_001.0 + FORGOTTEN)
    assert [entry.key for entry in store.list()] == [young, "probes/somebody-else"] and another.startswith("probes/87401-")
