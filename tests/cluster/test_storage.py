"""What every store promises, on a folder and on a real S3 server."""

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import folder, parts, patience, s3
from cluster.folder import ABANDONED, FolderStore
from cluster.patience import Patience, end_with
from cluster.storage import AlreadyExists, NotFound, Permanent, Stale, StorageError, Store, open_store
from tests.cluster.faulty import FaultyProxy, faulty_proxy


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


def read_range(store: Store, key: str, start: int, length: int) -> bytes:
    """What `read_into` brings."""
    buffer = bytearray(length)
    store.read_into(key, start, memoryview(buffer))
    return bytes(buffer)


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
    store.prove()
    assert list(store.list()) == []


@pytest.mark.parametrize("forgets", ["create", "replace"])
def test_a_store_that_ignores_conditions_is_refused(tmp_path: Path, forgets: str) -> None:
    def ignore(self: FolderStore, key: str, data: bytes, *_: str) -> str:
        self.put(key, data)
        return self.get(key)[1]

    forgetful = type("Forgetful", (FolderStore,), {forgets: ignore})(tmp_path)
    with pytest.raises(StorageError, match=f"{tmp_path}: conditional puts are ignored.*If-None-Match"):
        forgetful.prove()
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
    monkeypatch.setitem(folder._swept, tmp_path, left.stat().st_mtime - ABANDONED - 1)  # as if that had been an hour ago
    lock, living = tmp_path / ".~lock", left.with_name(f"{left.name}2")
    for path, age in {left: ABANDONED + 5, lock: 2 * ABANDONED, living: ABANDONED - 60}.items():
        path.touch()
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    store.put("y", b"the same process writes again")
    assert sorted(tmp_path.iterdir()) == sorted([lock, living, tmp_path / "x", tmp_path / "y"])


def test_a_missing_bucket_and_a_wrong_secret_fail_at_once_without_a_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'nobody-made-this'") as caught:
        open_store("s3://nobody-made-this/x").create("a", b"")
    assert not isinstance(caught.value, NotFound)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageError, match=f"{s3_url}/a at http://.*403") as caught:
        open_store(s3_url).read("a")
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def proxy(object_store, monkeypatch: pytest.MonkeyPatch):
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def test_a_body_that_breaks_off_is_continued_from_there(s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store, content = open_store(s3_url), os.urandom(1 << 20)
    store.put("x", content)
    proxy.requests.clear()
    proxy.faults = ["cut", "cut"]
    assert read_range(store, "x", 1000, 1 << 19) == content[1000 : 1000 + (1 << 19)]
    assert proxy.happened == ["cut", "cut"]
    end = 1000 + (1 << 19)
    assert proxy.requests == [f"GET bytes={end - left}-{end - 1}" for left in (1 << 19, 1 << 18, 1 << 17)]
    for fault in ("cut", "endless"):
        proxy.faults = [fault]
        assert store.read("x") == content
        assert proxy.happened[-1] == fault
    monkeypatch.setattr(s3, "PATIENCE", 0.2)
    proxy.faults = ["cut"] * 30
    with pytest.raises(StorageError, match=rf"{s3_url}/x.*broke off \d+ times"):
        read_range(store, "x", 0, 1 << 19)


def test_ranges_of_an_object_are_asked_for_by_one_signed_url_and_boto3_is_asked_where_that_fails(
    s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, content = open_store(s3_url), os.urandom(10_000)
    store.put("x", content)
    client, asked = store.raw("x")[0], []
    client.meta.events.register("before-call.s3.GetObject", lambda **_: asked.append(1))
    for start in range(0, 9000, 1000):
        assert read_range(store, "x", start, 900) == content[start : start + 900]
    assert not asked
    proxy.faults = ["busy"]
    assert read_range(store, "x", 5, 900) == content[5:905]
    assert proxy.happened == ["busy"] and len(asked) == 1
    monkeypatch.setattr(client, "generate_presigned_url", lambda *_, **__: f"{proxy.endpoint}/nobody?X-Amz-Signature=0")
    for _ in range(s3.REFUSALS):
        assert read_range(store, "x", 7, 900) == content[7:907], "a URL that is refused"
    assert len(asked) == 1 + s3.REFUSALS
    proxy.requests.clear()
    assert read_range(store, "x", 7, 900) == content[7:907]
    assert len(proxy.requests) == 1, "boto3 is asked at once"
    with pytest.raises(StorageError) as caught:
        read_range(store, "x", 9_999, 5)
    with pytest.raises(NotFound) as gone:
        read_range(store, "y", 0, 5)
    assert "Signature" not in f"{caught.value} {gone.value} {caplog.text}"


@pytest.mark.parametrize("fault", ["stall", "endless", "trickle", "busy", "down", "lose"])
def test_a_read_goes_on_from_where_it_was_whatever_the_server_does(
    fault: str, s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "STALL", 0.3)  # of bodies: that an answer begins late is no part of this
    monkeypatch.setattr(s3, "CHUNK", 10_000)
    store, content = open_store(s3_url), os.urandom(300_000)
    store.put("x", content)
    proxy.faults, proxy.requests = [fault] * 2, []
    assert read_range(store, "x", 1000, 200_000) == content[1000:201_000]
    assert proxy.happened == [fault] * 2
    if fault in ("stall", "trickle"):
        starts = [int(request.removeprefix("GET bytes=").partition("-")[0]) for request in proxy.requests]
        assert starts[0] == 1000 < starts[1] < starts[2], "what came was kept"


def test_an_outage_is_waited_out_by_who_has_seen_the_server_and_not_by_who_never_has(
    s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "FIRST_PATIENCE", 0.0)
    store, stranger = open_store(s3_url), open_store(s3_url)
    store.put("x", b"1")
    proxy.faults = ["down"] * 12
    with pytest.raises(StorageError, match=f"{s3_url}/x at http://"):
        stranger.read("x")
    left = len(proxy.faults)
    assert store.read("x") == b"1" and proxy.happened.count("down") == 12 and left > 4


def test_credentials_that_have_expired_are_looked_up_once_more(s3_url: str, proxy: FaultyProxy) -> None:
    store = open_store(s3_url)
    proxy.faults = ["expired"]
    store.put("x", b"1")
    proxy.faults = ["expired"]
    assert store.size("x") == 1, "what is said to a HEAD has no words"
    proxy.faults = ["expired"] * 2
    with pytest.raises(StorageError, match="credentials have expired; renew them"):
        store.read("x")
    assert proxy.happened == ["expired"] * 4


def test_a_busy_server_is_asked_again(s3_url: str, proxy: FaultyProxy) -> None:
    store = open_store(s3_url)
    proxy.faults = ["busy", "busy"]
    store.put("x", b"1")
    proxy.faults = ["busy"]
    assert store.read("x") == b"1"
    assert proxy.happened == ["busy"] * 3


def test_a_conditional_write_whose_answer_is_lost_still_knows_that_it_won(s3_url: str, proxy: FaultyProxy) -> None:
    store = open_store(s3_url)
    proxy.faults = ["lose"]
    etag = store.create("x", b"mine")
    proxy.faults = ["lose"]
    etag = store.replace("x", b"mine too", etag)
    assert proxy.happened == ["lose", "lose"]
    assert store.get("x") == (b"mine too", etag)
    proxy.faults = ["lose"]
    with pytest.raises(AlreadyExists):
        store.create("x", b"mine too")


def test_a_server_that_is_not_there_is_named(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "FIRST_PATIENCE", 0.0)
    with pytest.raises(StorageError, match=f"{s3_url}/x at http://127.0.0.1:9"):
        open_store(s3_url).read("x")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content of three parts, of the least size that a server takes; between tries there is little rest."""
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(parts, "PART", 5 << 20)
    return os.urandom((12 << 20) + 7)


@pytest.mark.parametrize("way", ["put", "put_file"])
def test_what_is_large_is_written_in_parts(way: str, s3_url: str, proxy: FaultyProxy, small_parts: bytes, tmp_path: Path) -> None:
    store = open_store(s3_url)
    (tmp_path / "local").write_bytes(small_parts)
    getattr(store, way)("x", small_parts if way == "put" else tmp_path / "local")
    assert proxy.requests == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert store.read("x") == small_parts


@pytest.mark.parametrize(
    "faults",
    [
        ["busy"] * 9,
        ["mangled"] * 9,
        ["reset"] * 9,
        ["lose"] * 5,
        ["down"] * 9,
        ["", "busy", "", "busy", "", "busy", "reset", "lose", "down"],
    ],
    ids=lambda faults: "-".join(sorted(set(faults))),
)
def test_a_write_in_parts_goes_on_whatever_the_server_does(faults: list[str], s3_url: str, proxy: FaultyProxy, small_parts: bytes) -> None:
    store = open_store(s3_url)
    store.put("x", b"before")
    proxy.arm(faults, aim="PUT|POST", after=1)
    store.put("x", small_parts)
    assert proxy.happened == [fault for fault in faults if fault]
    assert store.read("x") == small_parts


@pytest.mark.parametrize("again", ["", "gone"])
def test_a_write_whose_last_answer_is_lost_is_known_to_be_whole(again: str, s3_url: str, proxy: FaultyProxy, small_parts: bytes) -> None:
    store = open_store(s3_url)
    proxy.arm(["lose", again], aim="POST", after=1)
    store.put("x", small_parts)
    assert proxy.happened == (["lose", "gone"] if again else ["lose"])
    assert proxy.requests.count("PUT") == 3, "no part came twice"
    assert store.read("x") == small_parts
    proxy.arm(["gone"], aim="POST", after=1)
    with pytest.raises(StorageError, match="no such upload") as caught:
        store.put("x", small_parts[::-1])
    assert not isinstance(caught.value, Permanent), "to write it again may help"
    assert store.read("x") == small_parts


def test_a_write_that_is_refused_in_the_middle_leaves_nothing(
    s3_url: str, proxy: FaultyProxy, small_parts: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.put("x", b"before")
    client, where = store.raw("x")
    monkeypatch.setattr(parts, "AT_ONCE", 1)
    proxy.arm(["", "denied"], aim="PUT")
    with pytest.raises(Permanent, match="AccessDenied"):
        store.put("x", small_parts)
    assert proxy.happened == ["denied"]
    assert store.read("x") == b"before"
    uploads = client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=where["Key"])
    assert not uploads.get("Uploads")


def test_a_listing_goes_on_from_the_page_where_it_was(s3_url: str, proxy: FaultyProxy) -> None:
    store = open_store(s3_url)
    for number in range(6):
        store.put(f"{number}", b"")
    client, _ = store.raw("x")
    client.meta.events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: params | {"MaxKeys": 2})
    proxy.requests.clear()
    proxy.arm(["busy", "busy", "busy", "", "busy", "busy"], aim="GET", after=1)
    assert [entry.key for entry in store.list()] == list("012345")
    assert proxy.happened == ["busy"] * 5
    assert len(proxy.requests) == 3 + 5


def test_many_readers_use_their_connections_again(s3_url: str, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(s3_url)
    store.put("x", b"0123456789")
    proxy.faults = ["late"] * 40
    with ThreadPoolExecutor(40) as pool:
        assert set(pool.map(lambda _: read_range(store, "x", 3, 2), range(40))) == {b"34"}
    assert proxy.happened == ["late"] * 40
    assert "pool is full" not in caplog.text


def test_patience_counts_from_the_first_fault() -> None:
    now = 0.0
    patience = Patience(lambda: now)
    now = 1e6
    assert patience.lasts(120)
    now += 119
    assert patience.lasts(120)
    now += 1
    assert not patience.lasts(120)
    assert patience.faults == 3


def test_a_thread_whose_work_is_over_waits_for_nothing(s3_url: str, proxy: FaultyProxy) -> None:
    store, over = open_store(s3_url), threading.Event()
    store.put("x", b"1")
    proxy.faults = ["down"] * 1000
    with ThreadPoolExecutor(1, initializer=end_with, initargs=(over,)) as pool:
        reading = pool.submit(store.read, "x")
        while len(proxy.happened) < 4:
            time.sleep(0.01)
        over.set()
        with pytest.raises(StorageError, match=f"{s3_url}/x"):
            reading.result(60)
    left = len(proxy.faults)
    assert left > 900
