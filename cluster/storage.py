"""One small API over folders and S3. This is the only module that knows boto3."""

import contextlib
import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from boto3 import Session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from cluster.folder import FolderStore
from cluster.store import AlreadyExists, Entry, Meter, NotFound, Stale, StorageError, Store, checked, content_hash

__all__ = ["AlreadyExists", "Entry", "NotFound", "S3Store", "Stale", "StorageError", "Store", "content_hash", "open_store"]

TRIES = 4
"""Requests made before a fault that may pass is reported, without progress in between."""

PART = 64 << 20
"""Bytes of one part of a multipart upload."""

CHUNK = 4 << 20
"""Bytes taken from a connection at once."""

# Checksums "when_required": lengths and CRC32C are checked by the readers, and validation in boto3 costs four times the CPU.
CONFIG = Config(
    s3={"addressing_style": "path"},
    max_pool_connections=32,
    retries={"mode": "standard", "total_max_attempts": TRIES},
    connect_timeout=3,
    read_timeout=10,
    tcp_keepalive=True,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

FAULTS = (BotoCoreError, Boto3Error, HTTPError, OSError)
"""What boto3 raises when no answer or half an answer came; an answer that says no is a ClientError."""


def open_store(url: str) -> Store:
    """The store at a folder's path, `file:///path` or `s3://bucket/prefix`.

    The S3 endpoint and the credentials are those of the environment or the machine's role (AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION), never part of the URL.

    Raises:
        ValueError: for any other URL.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError(f"a {parts.scheme}:// URL holds credentials; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if "://" not in url and url:
        return FolderStore(Path(url).absolute())
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        return S3Store(parts.netloc, parts.path.strip("/"))
    raise ValueError(f"{url!r} is no store: use a folder's path, file:///path or s3://bucket/prefix")


class S3Store(Store):
    """Objects below a prefix of a bucket, on AWS S3 or any server that speaks its protocol."""

    node_local = False

    def __init__(self, bucket: str, prefix: str, client: Any = None, meter: Meter | None = None):
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"), meter or Meter())
        self._bucket, self._prefix = bucket, f"{checked(prefix)}/" if prefix else ""
        self._client = client or Session().client("s3", config=CONFIG)
        if "@" in urlsplit(self.endpoint).netloc:
            raise ValueError("AWS_ENDPOINT_URL holds credentials; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    @property
    def endpoint(self) -> str:
        """The server that answers."""
        return self._client.meta.endpoint_url

    def at(self, prefix: str) -> "S3Store":
        """The store of the objects below this prefix."""
        return S3Store(self._bucket, f"{self._prefix}{checked(prefix)}", self._client, self._meter)

    def get(self, key: str) -> tuple[bytes, str]:
        """An object's content and its etag."""
        answer = self._call("get_object", key)
        buffer = memoryview(bytearray(answer["ContentLength"]))
        done, _ = self._drain(answer["Body"], buffer)
        self._fill(key, done, buffer[done:], answer["ETag"])
        return bytes(buffer), answer["ETag"]

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill a writable buffer with an object's content from byte `start` on."""
        self._fill(key, start, buffer)

    def size(self, key: str) -> int:
        """An object's size in bytes."""
        return self._call("head_object", key)["ContentLength"]

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever was there before."""
        self._call("put_object", key, Body=data)

    def put_file(self, key: str, path: Path) -> None:
        """Write a large object from a local file in parts, whatever was there before."""
        transfer = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)
        with self._errors(key):
            self._client.upload_file(str(path), self._bucket, self._prefix + checked(key), Config=transfer)

    def create(self, key: str, data: bytes) -> str:
        """Write an object that must not exist yet, and return its etag."""
        return self._conditional(key, data, AlreadyExists(f"{self.url}/{key}: exists already"), IfNoneMatch="*")

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Overwrite the content this etag stands for, and return the new etag."""
        return self._conditional(key, data, Stale(f"{self.url}/{key}: is not the content of etag {etag} any more"), IfMatch=etag)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key begins with this text, in the order of their keys' UTF-8 bytes."""
        checked(f"{prefix}x")
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
        with self._errors(prefix):
            items = [Entry(item["Key"].removeprefix(self._prefix), item["Size"]) for page in pages for item in page.get("Contents", ())]
        yield from sorted(items, key=lambda entry: entry.key.encode())  # AWS sorts so; others sort folder by folder, or not at all

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self._call("delete_object", key)

    def _fill(self, key: str, start: int, buffer: memoryview, etag: str = "") -> None:
        """Read until the buffer is full. A body that breaks off is continued where it broke, if the object is still the same."""
        done = failures = 0
        while done < len(buffer):
            wanted = len(buffer) - done
            condition = {"IfMatch": etag} if etag else {}
            answer = self._call("get_object", key, Range=f"bytes={start + done}-{start + done + wanted - 1}", **condition)
            etag, coming = answer["ETag"], answer.get("ContentLength", wanted)
            if coming != wanted:
                raise StorageError(
                    f"{self.url}/{key} at {self.endpoint}: {coming} bytes came, but bytes {start + done} to {start + done + wanted} "
                    "were asked for: the object is shorter, or the server ignores ranges"
                )
            count, cause = self._drain(answer["Body"], buffer[done:])
            done += count
            if done < len(buffer):
                failures += 1
                if failures == TRIES:
                    raise StorageError(
                        f"{self.url}/{key} at {self.endpoint}: the answer broke off {TRIES} times, the last time at byte {start + done}: "
                        f"{cause or 'it ended early'}"
                    ) from cause
                _back_off(failures)

    def _drain(self, body: Any, buffer: memoryview) -> tuple[int, Exception | None]:
        """Bytes that came before the buffer was full or the body broke off, and why it did."""
        done, cause = 0, None
        try:
            with contextlib.closing(body):
                while done < len(buffer) and (count := body.readinto(buffer[done : done + CHUNK])):
                    done += count
        except FAULTS as error:
            cause = error
        self._meter.add(done)
        return done, cause

    def _conditional(self, key: str, data: bytes, refused: StorageError, **condition: str) -> str:
        """A conditional put; its writer's name is kept beside it, so that a put whose answer was lost is known to be ours."""
        writer = uuid.uuid4().hex
        for attempt in range(TRIES):
            try:
                answer = self._client.put_object(
                    Bucket=self._bucket, Key=self._prefix + checked(key), Body=data, Metadata={"writer": writer}, **condition
                )
                return answer["ETag"]
            except ClientError as error:
                if _status(error) == 409 and attempt + 1 < TRIES:  # AWS: two conditional writes met, neither was decided
                    _back_off(attempt)
                    continue
                if _status(error) != 412 and _code(error) != "NoSuchKey":
                    raise self._error(key, error) from error
                if attempt or error.response["ResponseMetadata"].get("RetryAttempts"):
                    with contextlib.suppress(NotFound):
                        head = self._call("head_object", key)
                        if head["Metadata"].get("writer") == writer:
                            return head["ETag"]
                raise refused from error
            except FAULTS as error:
                raise self._error(key, error) from error
        raise AssertionError("the last attempt returns or raises")

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        with self._errors(key):
            return getattr(self._client, operation)(Bucket=self._bucket, Key=self._prefix + checked(key), **arguments)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, *FAULTS) as error:
            raise self._error(key, error) from error

    def _error(self, key: str, error: Exception) -> StorageError:
        where = f"{self.url}/{key} at {self.endpoint}"
        if not isinstance(error, ClientError):
            return StorageError(f"{where}: {error}")
        if _code(error) == "NoSuchBucket":
            return StorageError(f"{where}: there is no bucket {self._bucket!r}; create it, or correct the URL")
        if _status(error) == 404:
            return NotFound(f"{where}: there is no such object")
        if _status(error) == 412:
            return StorageError(f"{where}: the object was changed while it was being read")
        if _status(error) == 416:
            return StorageError(f"{where}: the object is shorter than the bytes asked for")
        return StorageError(f"{where}: the server says {_code(error)} ({_status(error)}): {error.response['Error'].get('Message', '')}")


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _back_off(attempt: int) -> None:
    """Wait a random time below a bound that doubles: many ranks that failed together do not come back together."""
    time.sleep(random.SystemRandom().uniform(0, 0.1 * 2**attempt))
