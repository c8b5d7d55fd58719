"""What a bucket promises beyond a store, whatever the network and the server do."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.storage import AlreadyExists, NotFound, Permanent, StorageError, multipart, open_store, retry, s3
from cluster.storage.retry import Retry, cancel_retries_on
from tests.cluster.support.certificate import self_signed
from tests.cluster.support.faulty import FaultyProxy, faulty_proxy
from tests.cluster.support.metadata import MetadataService, metadata_service
from tests.cluster.support.streaming import read_range


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
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.2)
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
    proxy.faults, proxy.requests = ["busy"] * 3, []
    assert read_range(store, "x", 5, 900) == content[5:905]
    assert proxy.happened == ["busy"] * 3 and len(proxy.requests) == 4 and not asked, "a server that is busy is asked once a pause"
    monkeypatch.setattr(client, "generate_presigned_url", lambda *_, **__: f"{proxy.endpoint}/nobody?X-Amz-Signature=0")
    store.put("z", content)  # which has no URL yet
    for _ in range(s3.REFUSALS):
        assert read_range(store, "z", 7, 900) == content[7:907], "a URL that is refused"
    assert len(asked) == s3.REFUSALS
    proxy.requests.clear()
    assert read_range(store, "z", 7, 900) == content[7:907]
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
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    store, stranger = open_store(s3_url), open_store(s3_url)
    store.put("x", b"1")
    proxy.faults = ["down"] * 12
    with pytest.raises(StorageError, match=f"{s3_url}/x at http://"):
        stranger.read("x")
    left = len(proxy.faults)
    assert store.read("x") == b"1" and proxy.happened.count("down") == 12 and left > 4
    proxy.faults = ["down"] * 2
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1", "one that was handed over has seen it"


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


@pytest.fixture
def role(object_store, monkeypatch: pytest.MonkeyPatch):
    """Credentials come from this machine's role alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    with metadata_service(object_store) as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
        yield service


def test_a_machine_that_does_not_hand_out_credentials_at_once_is_asked_again(s3_url: str, role: MetadataService) -> None:
    role.busy = 4
    store = open_store(s3_url)
    store.put("x", b"123")
    assert role.asked > 4 and role.busy == 0
    role.busy = 4
    assert pickle.loads(pickle.dumps(store)).read("x") == b"123"
    assert role.busy == 0


def test_a_container_that_does_not_hand_out_credentials_at_once_is_asked_again(
    s3_url: str, role: MetadataService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{role.endpoint}/credentials")
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.0)
    role.busy = 3  # boto3 itself tries three times
    store = open_store(s3_url)
    assert role.busy == 0
    role.busy = 3  # what it handed out ends soon, and it has no new ones for a while
    store.put("x", b"123")
    assert role.busy == 0
    role.busy = 3
    assert read_range(store, "x", 1, 2) == b"23" and role.busy == 0
    role.busy = 10_000
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    with pytest.raises(Permanent, match=f"{s3_url}: no credentials: .*set AWS_ACCESS_KEY_ID"):
        open_store(s3_url)
    assert role.busy == 10_000 - 3


def test_credentials_that_nobody_has_are_said_to_be_missing_also_where_others_have_seen_the_server(
    s3_url: str, role: MetadataService, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.put("x", b"1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.5)
    with pytest.raises(Permanent, match=rf"{s3_url}/x at http://\S+: no credentials: .*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        pickle.loads(pickle.dumps(store)).read("x")


def test_settings_of_this_machine_that_are_wrong_are_refused(
    s3_url: str, tmp_path: Path, object_store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for text, profile, says in (
        ("", "nobody", r"profile \(nobody\) could not be found"),
        ("neither a section nor a key", "default", "parse config file"),
        ("[profile half]\nrole_arn = arn:aws:iam::1:role/x\n", "half", "Partial credentials"),
    ):
        config.write_text(text)
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(Permanent, match=f"{s3_url}: .*{says}.*; correct the AWS_"):
            open_store(s3_url)


def test_a_busy_server_is_asked_again(s3_url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_url)
    proxy.faults = ["busy", "busy"]
    store.put("x", b"1")
    proxy.faults = ["busy"]
    assert store.read("x") == b"1"
    assert proxy.happened == ["busy"] * 3 and len(proxy.requests) == 5, "once a pause"
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    proxy.faults = ["busy"] * 2
    assert read_range(open_store(s3_url), "x", 0, 1) == b"1", "who says that he is busy is there"
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.0)
    proxy.faults = ["busy"] * 2
    with pytest.raises(StorageError, match=rf"{s3_url}/x at http://\S+: the server is too busy, 1 times"):
        read_range(open_store(s3_url), "x", 0, 1)
    assert len(proxy.faults) == 1


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
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    with pytest.raises(StorageError, match=f"{s3_url}/x at http://127.0.0.1:9"):
        open_store(s3_url).read("x")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content of three parts, of the least size that a server takes; between tries there is little rest."""
    monkeypatch.setattr(retry, "MAX_BACKOFF_SECONDS", 0.1)
    monkeypatch.setattr(multipart, "PART_BYTES", 5 << 20)
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
    monkeypatch.setattr(multipart, "CONCURRENT_PARTS", 1)
    proxy.arm(["", "denied"], aim="PUT")
    with pytest.raises(Permanent, match="AccessDenied"):
        store.put("x", small_parts)
    assert proxy.happened == ["denied"]
    assert store.read("x") == b"before"
    uploads = client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=where["Key"])
    assert not uploads.get("Uploads")


def test_uploads_that_were_never_completed_are_aborted_and_those_beside_the_prefix_are_not(s3_url: str, proxy: FaultyProxy) -> None:
    store = open_store(s3_url)
    client, where = store.raw("run/part")
    _, beside = store.raw("running/part")
    for one in (where, where, beside):
        client.create_multipart_upload(**one)
    store.put("run/whole", b"stays")
    proxy.arm(["busy"], aim="DELETE")
    store.at("run").delete_unfinished()
    assert proxy.happened == ["busy"]
    left = client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=where["Key"].removesuffix("run/part"))
    assert [one["Key"] for one in left["Uploads"]] == [beside["Key"]]
    assert store.read("run/whole") == b"stays"
    client.abort_multipart_upload(**beside, UploadId=left["Uploads"][0]["UploadId"])


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


def test_the_time_limit_of_retries_counts_from_the_first_fault() -> None:
    now = 0.0
    tries = Retry(lambda: now)
    now = 1e6
    assert tries.again(120)
    now += 119
    assert tries.again(120)
    now += 1
    assert not tries.again(120)
    assert tries.faults == 3


@pytest.fixture
def encrypted(object_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A proxy whose certificate is trusted, as that of a company's own server is, and between tries there is little rest."""
    certificate = self_signed(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(retry, "MAX_BACKOFF_SECONDS", 0.1)
    with faulty_proxy(object_store.endpoint, certificate) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


OPERATIONS = {
    "put": lambda store: store.put("x", bytes(8 << 20)),
    "create": lambda store: store.create("y", b"2"),
    "size": lambda store: store.size("there"),
    "get": lambda store: store.read("there"),
    "read_into": lambda store: read_range(store, "there", 1, 2),
    "list": lambda store: list(store.list()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_handshake_that_breaks_off_is_begun_again(operation: str, s3_url: str, encrypted: FaultyProxy) -> None:
    open_store(s3_url).put("there", b"1234")
    encrypted.handshakes = 3
    OPERATIONS[operation](open_store(s3_url))  # a new one: it has no connection yet
    assert encrypted.happened == ["handshake"] * 3


def test_what_breaks_off_while_it_is_sent_encrypted_is_sent_again(s3_url: str, encrypted: FaultyProxy, small_parts: bytes) -> None:
    """OpenSSL calls it a violation of protocol when the other side closes while a body is being sent."""
    store, content = open_store(s3_url), os.urandom(4 << 20)
    encrypted.faults = ["reset"] * 2
    store.put("x", content)
    encrypted.faults = ["reset"] * 2
    store.create("y", content)
    assert encrypted.happened == ["reset"] * 4
    assert store.read("x") == store.read("y") == content
    encrypted.arm(["reset"] * 4, aim="PUT")
    store.put("z", small_parts)
    assert encrypted.happened == ["reset"] * 8
    encrypted.arm(["cut", "endless", "reset", "down"])
    assert read_range(store, "z", 1000, 9 << 20) == small_parts[1000 : 1000 + (9 << 20)]
    assert encrypted.happened[8:] == ["cut", "endless", "reset", "down"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_certificate_that_is_not_trusted_is_refused_at_once(
    operation: str, s3_url: str, encrypted: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    for bundle in ("", self_signed(tmp_path / "other"), tmp_path / "nowhere.pem"):
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle)) if bundle else monkeypatch.delenv("AWS_CA_BUNDLE")
        monkeypatch.setattr(Retry, "again", lambda *_: pytest.fail("it was tried again"))
        with pytest.raises(Permanent, match=rf"{s3_url}\S* at https://127.0.0.1:\d+: .*AWS_CA_BUNDLE"):
            OPERATIONS[operation](open_store(s3_url))
    assert not encrypted.requests


def test_what_is_left_of_an_encrypted_body_at_its_deadline_is_decrypted(
    s3_url: str, encrypted: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline passes while the reader is busy with what came, as it does for a process that was stopped for a while."""
    monkeypatch.setattr(s3, "STALL", 0.3)
    monkeypatch.setattr(s3, "CHUNK", 10_000)
    store, content, busy = open_store(s3_url), os.urandom(200_000), [1.0]
    store.put("x", content)
    told, buffer = bytearray(), bytearray(len(content))

    def on_bytes(piece: memoryview) -> None:
        told.extend(piece)
        if busy:
            time.sleep(busy.pop())

    store.read_into("x", 0, memoryview(buffer), on_bytes=on_bytes)
    assert buffer == content == told
    encrypted.faults = ["stall", "trickle"]
    assert read_range(store, "x", 1000, 150_000) == content[1000:151_000]
    assert encrypted.happened == ["stall", "trickle"]


def test_a_thread_whose_work_is_over_waits_for_nothing(s3_url: str, proxy: FaultyProxy) -> None:
    store, over = open_store(s3_url), threading.Event()
    store.put("x", b"1")
    proxy.faults = ["down"] * 1000
    with ThreadPoolExecutor(1, initializer=cancel_retries_on, initargs=(over,)) as pool:
        reading = pool.submit(store.read, "x")
        while len(proxy.happened) < 4:
            time.sleep(0.01)
        over.set()
        with pytest.raises(StorageError, match=f"{s3_url}/x"):
            reading.result(60)
    left = len(proxy.faults)
    assert left > 900


def test_stores_of_one_server_still_share_it_where_they_arrive_pickled(s3_url: str) -> None:
    store = open_store(s3_url)
    store.put("runs/a/x", b"1")
    run, home, other = pickle.loads(pickle.dumps((store.at("runs/a"), store, open_store(s3_url))))
    assert run._server is home._server is not other._server
    assert run.read("x") == home.read("runs/a/x") == other.read("runs/a/x") == b"1"
