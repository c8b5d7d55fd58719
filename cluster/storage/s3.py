"""A bucket as a store. This is the only module that knows boto3."""

import contextlib
import itertools
import logging
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from boto3 import Session
from botocore.awsrequest import AWSRequest
from botocore.client import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnection
from botocore.response import StreamingBody
from urllib3.exceptions import HTTPError

from cluster.storage import multipart
from cluster.storage.base import (
    AlreadyExists,
    BeyondEnd,
    ByteCounter,
    Entry,
    NotFound,
    OnBytes,
    Permanent,
    Stale,
    StorageError,
    Store,
    checked_key,
    ignore_bytes,
    remaining,
)
from cluster.storage.deadline import Deadlines
from cluster.storage.retry import Retry

T = TypeVar("T")

RETRY_SECONDS = 120.0
"""Seconds that a request is retried for, from its first fault on: an outage of a minute must not end a run of a week."""

FIRST_RETRY_SECONDS = 10.0
"""The same where the server has never answered, not even that it is busy: then it is more likely a wrong address. And where there are
no credentials: a machine's metadata service that many ranks ask at once may be late by seconds, keys that were forgotten never come."""

STALL = 10.0
"""Seconds in which a server must send something."""

SLOWEST = 1 << 20
"""Bytes a second that a body must reach at least; one that is slower is ended, and a new request asks for the rest."""

SIGNED = 1800
"""Seconds for which a signed URL is used."""

URLS = 1 << 14
"""Signed URLs that are kept: 0.7 KB each, 1.8 with a session token. To sign one costs as much as to send a request."""

REFUSALS = 8
"""Signed URLs refused in a row after which only boto3 is used: it follows redirections, they do not."""

POOL = 256
"""Connections that are kept open, more than readers and multipart uploads use at the same time; none is opened before it is needed."""

CHUNK = 1 << 20
"""Bytes read from a connection at once; a chunk that is incomplete when the server stops sending is requested again as a whole."""

# Checksums "when_required": lengths and CRC32C are checked by the readers, and validation in boto3 costs four times the CPU.
CONFIG = Config(
    s3={"addressing_style": "path"},
    signature_version="s3v4",
    max_pool_connections=POOL,
    retries={"mode": "standard", "total_max_attempts": 1},  # `Retry` does it: a busy server is not asked twice for each of its tries
    connect_timeout=3,
    read_timeout=STALL,
    tcp_keepalive=True,
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)

FAULTS = (BotoCoreError, HTTPError, OSError)
"""What boto3 raises when no answer came, or a part of one; an answer that refuses the request is a ClientError."""

RETRYABLE_EXCEPTIONS = (NoConnection, HTTPClientError, ConnectionError, TimeoutError, HTTPError, IncompleteReadError)
"""Those of them that a retry may help. Where TLS is spoken, a connection that breaks off while it is begun or sent on is a NoConnection."""

NO_CREDENTIALS = (NoCredentialsError, CredentialRetrievalError, MetadataRetrievalError)
"""There are none, or who hands them out has not answered. Of a machine's metadata service that does not answer boto3 says the first."""

UNTRUSTED = (ssl.SSLCertVerificationError, FileNotFoundError)
"""What a NoConnection comes of that a retry does not help: the server's certificate, or the file of those to trust, which is not there."""

RETRYABLE = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests"}
"""Codes of an answer that says no now and may say yes soon: such a request is retried."""

DAMAGED = {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
"""Codes that say that the request's body was damaged on its way, or did not come as a whole."""

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestTimeTooSkewed", "400"}
"""Codes for expired credentials. The last one is all that a HEAD is answered, for its answer has no body."""

DEADLINES = Deadlines()

logging.getLogger("urllib3.connection").setLevel(logging.ERROR)  # its warnings have whole URLs, signed ones too


class _Busy(Exception):
    """The server says that it cannot answer now."""


class _Server:
    """A server and the credentials for it, shared by all stores that were opened from one with `at`.

    Args:
        url: of the first of them, for messages.
        answered: whether the server has ever answered.

    Raises:
        Permanent: as `renew`.
    """

    def __init__(self, url: str, answered: bool = False) -> None:
        self._url, self.answered = url, answered
        self.renew()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Server, (self._url, self.answered)  # endpoint and credentials are those of the process that it arrives in

    def renew(self) -> None:
        """Look up endpoint and credentials again.

        Raises:
            Permanent: if what this machine knows of them is wrong, or who hands credentials out does not answer.
        """
        retry, client = Retry(), None
        while client is None:
            try:
                client = Session().client("s3", config=CONFIG)
            except BotoCoreError as error:
                if not (_retryable(error) and retry.again(self.retry_seconds(error))):
                    raise _unusable(self._url, error) from error
        self.client = client
        self._signed = lru_cache(maxsize=URLS)(self._sign)
        self._refused = 0

    def retry_seconds(self, error: Exception | None = None) -> float:
        """For how long a request is made again after an error: a server that has never answered may not be there at all."""
        return RETRY_SECONDS if self.answered and not isinstance(error, NoCredentialsError) else FIRST_RETRY_SECONDS

    def get(self, bucket: str, name: str, headers: dict[str, str]) -> Any | None:
        """The answer to a GET of a range of an object (status 206), or None where there is another one or none at all.

        The URL is signed once for all ranges of an object: boto3 signs, checks and parses each request anew, at four times the CPU time.
        Whatever fails here is requested again by boto3, which also raises the error; nothing of it is logged, for the URL gives access
        as a password does.

        Raises:
            _Busy: if the same request may be answered after a pause.
        """
        if self._refused >= REFUSALS:
            return None
        try:
            url = self._signed(bucket, name, int(time.monotonic() // SIGNED))
            request = AWSRequest("GET", url, headers, stream_output=True).prepare()
            answer = self.client._endpoint.http_session.send(request)
        except (ClientError, *FAULTS):  # a ClientError comes from the service that gives out credentials
            return None
        if answer.status_code == 206 and "ETag" in answer.headers:
            self._refused = 0
            return answer
        answer.raw.close()
        if _not_now(answer.status_code):
            raise _Busy
        if self._signed.cache_info().currsize:  # else another thread's URL expired at the same time, and was counted
            self._refused += answer.status_code in (301, 307, 400, 401, 403)
        self._signed.cache_clear()
        return None

    def _sign(self, bucket: str, name: str, _: int) -> str:
        return self.client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": name}, ExpiresIn=2 * SIGNED)


class S3Store(Store):
    """Objects below a prefix of a bucket, on AWS S3 or any server that speaks its protocol."""

    node_local = False

    def __init__(self, bucket: str, prefix: str, server: "_Server | None" = None, counter: ByteCounter | None = None):
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"), counter or ByteCounter())
        self._bucket, self._prefix = bucket, f"{checked_key(prefix)}/" if prefix else ""
        self._server = server or _Server(self.url)
        if "@" in urlsplit(self.endpoint).netloc:
            raise ValueError("AWS_ENDPOINT_URL holds credentials; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self._bucket, self._prefix.rstrip("/"), self._server)  # stores of one server still share it where they arrive

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return self._server.client.meta.endpoint_url

    def at(self, prefix: str) -> "S3Store":
        """The store of the objects below this prefix."""
        return S3Store(self._bucket, f"{self._prefix}{checked_key(prefix)}", self._server, self._counter)

    def raw(self, key: str) -> tuple[Any, dict[str, str]]:
        """boto3's client and its arguments that name an object, for what a store does not do: measuring the network, signing a URL."""
        return self._server.client, {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    def get(self, key: str) -> tuple[bytes, str]:
        """An object's content and its etag."""
        answer = self._call("get_object", key)
        etag, size = answer["ETag"], answer.get("ContentLength")
        if size is None:  # a proxy left it out; without it, a body that ends early cannot be told from a whole one
            size = self._call("head_object", key, IfMatch=etag)["ContentLength"]
        buffer = memoryview(bytearray(size))
        done, _ = self._read_body(answer["Body"], [buffer])
        self._fill(key, done, [buffer[done:]], etag)
        return bytes(buffer), etag

    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        """Fill writable buffers, one after the other, with an object's content from byte `start` on."""
        self._fill(key, start, buffers, on_bytes=on_bytes)

    def size(self, key: str) -> int:
        """An object's size in bytes."""
        return self._call("head_object", key)["ContentLength"]

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object, whatever was there before."""
        self._upload(key, len(data), lambda start, end: bytes(data[start:end]))

    def put_file(self, key: str, path: Path) -> None:
        """Write a large object from a local file, whatever was there before."""
        with open(path, "rb") as file:
            self._upload(key, os.fstat(file.fileno()).st_size, lambda start, end: os.pread(file.fileno(), end - start, start))

    def create(self, key: str, data: bytes) -> str:
        """Write an object that must not exist yet, and return its etag."""
        return self._conditional_put(key, data, AlreadyExists(f"{self.url}/{key}: exists already"), IfNoneMatch="*")

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Overwrite the content this etag stands for, and return the new etag."""
        return self._conditional_put(key, data, Stale(f"{self.url}/{key}: is not the content of etag {etag} any more"), IfMatch=etag)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects whose key begins with this text, in the order of their keys' UTF-8 bytes."""
        checked_key(f"{prefix}x")

        items: list[Entry] = []
        more: dict[str, str] | None = {}
        while more is not None:
            page = self._with_retries(prefix, methodcaller("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix + prefix, **more))
            items += [Entry(item["Key"].removeprefix(self._prefix), item["Size"]) for item in page.get("Contents", ())]
            more = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None
        yield from sorted(items, key=lambda entry: entry.key.encode())  # AWS sorts so; others sort folder by folder, or not at all

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        self._call("delete_object", key)

    def delete_unfinished(self) -> None:
        """Abort the multipart uploads of all who write or wrote below this prefix."""
        more: dict[str, str] | None = {}
        while more is not None:
            page = self._with_retries("", methodcaller("list_multipart_uploads", Bucket=self._bucket, Prefix=self._prefix, **more))
            for upload in page.get("Uploads", ()):
                with contextlib.suppress(NotFound):  # it was finished meanwhile
                    self._call("abort_multipart_upload", upload["Key"].removeprefix(self._prefix), UploadId=upload["UploadId"])
            more = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker")} if page.get("IsTruncated") else None

    def _fill(self, key: str, start: int, buffers: Sequence[memoryview], etag: str = "", on_bytes: OnBytes = ignore_bytes) -> None:
        """Read until the buffers are full. If a body breaks off, a new request asks for the rest, if the object is still the same."""
        done, size, retry = 0, sum(map(len, buffers)), Retry()
        while done < size:
            wanted = size - done
            etag, length, body = self._get_range(key, start + done, start + size, etag)
            if length not in (wanted, None):
                body.close()
                where, last = f"{self.url}/{key} at {self.endpoint}", start + size
                came = f"{where}: {length} bytes came, but bytes {start + done} to {last} were asked for"
                if length < wanted:
                    raise BeyondEnd(f"{came}: the object is shorter")
                raise Permanent(f"{came}: the server ignores ranges")
            count, cause = self._read_body(body, remaining(buffers, done), on_bytes)
            done += count
            if done < size and not retry.again(RETRY_SECONDS + size / SLOWEST):
                raise StorageError(
                    f"{self.url}/{key} at {self.endpoint}: the answer broke off {retry.faults} times in {RETRY_SECONDS:g} s and more, the "
                    f"last time at byte {start + done}: {cause or 'it ended early'}"
                ) from cause

    def _get_range(self, key: str, start: int, end: int, etag: str) -> tuple[str, int | None, StreamingBody]:
        """Etag, length (None if the server does not tell) and body of the answer to a request for these bytes of an object."""
        span, name = f"bytes={start}-{end - 1}", self._prefix + checked_key(key)
        response, retry = None, Retry()
        while True:
            try:
                response = self._server.get(self._bucket, name, {"Range": span} | ({"If-Match": etag} if etag else {}))
                break
            except _Busy:
                self._server.answered = True
                if not retry.again(self._server.retry_seconds()):
                    raise StorageError(f"{self.url}/{key} at {self.endpoint}: the server is too busy, {retry.faults} times") from None
        if response is not None:
            self._server.answered = True
            length = response.headers.get("Content-Length")
            return response.headers["ETag"], length and int(length), StreamingBody(response.raw, length)
        answer = self._call("get_object", key, Range=span, **({"IfMatch": etag} if etag else {}))
        return answer["ETag"], answer.get("ContentLength"), answer["Body"]

    def _read_body(self, body: Any, buffers: Sequence[memoryview], on_bytes: OnBytes = ignore_bytes) -> tuple[int, Exception | None]:
        """Read a body into buffers, under a deadline; returns the bytes that came, and the error if it broke off."""
        done, cause, seconds = 0, None, STALL + sum(map(len, buffers)) / SLOWEST
        try:
            with contextlib.closing(body), DEADLINES.within(seconds, lambda: _shut(body)):
                for buffer in buffers:
                    at = 0
                    while at < len(buffer) and (count := body.readinto(buffer[at : at + CHUNK])):
                        on_bytes(buffer[at : at + count])
                        at += count
                        done += count
                    if at < len(buffer):
                        break
        except FAULTS as error:
            cause = error
        self._counter.add(done)
        return done, cause

    def _conditional_put(self, key: str, data: bytes, refused: StorageError, **condition: str) -> str:
        """A conditional put. The writer's name is in the object's metadata, so that a put whose answer was lost is known to be ours."""
        writer, name, attempts = uuid.uuid4().hex, self._prefix + checked_key(key), itertools.count()

        def write(client: Any) -> str:
            attempt = next(attempts)
            try:
                return client.put_object(Bucket=self._bucket, Key=name, Body=data, Metadata={"writer": writer}, **condition)["ETag"]
            except ClientError as error:
                if _status(error) != 412 and _code(error) != "NoSuchKey":
                    raise
                if attempt:
                    etag = multipart.etag_if_written_by(writer, lambda operation: self._call(operation, key))
                    if etag is not None:
                        return etag
                raise refused from error

        return self._with_retries(key, write)

    def _upload(self, key: str, size: int, piece: Callable[[int, int], bytes]) -> None:
        """Write an object of this size; `piece` returns its bytes from one offset to another."""
        multipart.upload(lambda operation, **arguments: self._call(operation, key, **arguments), size, piece)

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        """The answer to an operation on an object."""
        return self._with_retries(key, methodcaller(operation, Bucket=self._bucket, Key=self._prefix + checked_key(key), **arguments))

    def _with_retries(self, key: str, request: Callable[[Any], T]) -> T:
        """The answer to a request, retried with backoff while a retry may help; expired credentials are looked up again once."""
        retry, renewed = Retry(), False
        while True:
            try:
                answer = request(self._server.client)
                self._server.answered = True
                return answer
            except (ClientError, *FAULTS) as error:
                self._server.answered |= isinstance(error, ClientError)
                if isinstance(error, ClientError) and _code(error) in EXPIRED and not renewed:
                    self._server.renew()  # the environment or its files may have new ones
                    renewed = True
                elif not (_retryable(error) and retry.again(self._server.retry_seconds(error))):
                    raise self._error(key, error) from error
                elif isinstance(error, NoCredentialsError):
                    self._server.renew()  # a client that was made without any never looks for them again

    def _error(self, key: str, error: Exception) -> StorageError:
        where = f"{self.url}/{key} at {self.endpoint}"
        if isinstance(error, NO_CREDENTIALS) or (isinstance(error, BotoCoreError) and not _retryable(error)):
            return _unusable(where, error)
        if not isinstance(error, ClientError) or _retryable(error):
            return StorageError(f"{where}: {error}")
        if _code(error) == "NoSuchBucket":
            return Permanent(f"{where}: there is no bucket {self._bucket!r}; create it, or correct the URL")
        if _status(error) == 404:
            return NotFound(f"{where}: there is no such {'upload' if _code(error) == 'NoSuchUpload' else 'object'}")
        if _status(error) == 412:
            return StorageError(f"{where}: the object was changed while it was being read")
        if _status(error) == 416:
            return BeyondEnd(f"{where}: the object is shorter than the bytes asked for")
        if _code(error) in EXPIRED:
            return Permanent(
                f"{where}: the credentials have expired; renew them where Ray was started, and give the same command; if they have not, "
                "correct this machine's clock"
            )
        return Permanent(f"{where}: the server says {_code(error)} ({_status(error)}): {error.response['Error'].get('Message', '')}")


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _not_now(status: int) -> bool:
    """Whether an answer of this status says that the server is too busy, or broken for a moment."""
    return status in (408, 429) or (status >= 500 and status != 501)


def _retryable(error: BaseException) -> bool:
    """Whether a retry of the same request may help."""
    if isinstance(error, ClientError):
        # 409: AWS, where two conditional writes of one key came at the same time and neither was decided.
        return _code(error) in RETRYABLE | DAMAGED or _status(error) == 409 or _not_now(_status(error))
    return isinstance(error, RETRYABLE_EXCEPTIONS + NO_CREDENTIALS) and not _untrusted(error)


def _untrusted(error: BaseException) -> bool:
    """Whether there is no connection because this machine does not trust the server."""
    cause: BaseException | None = error if isinstance(error, NoConnection) else None
    while cause and not isinstance(cause, UNTRUSTED):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _unusable(where: str, error: BotoCoreError) -> Permanent:
    """The error of what a person must correct on this machine: credentials, certificates, or other settings of AWS clients."""
    if isinstance(error, NO_CREDENTIALS):
        return Permanent(
            f"{where}: no credentials: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every node, or give "
            "the machines a role that has access"
        )
    if _untrusted(error):
        return Permanent(
            f"{where}: {error}; set AWS_CA_BUNDLE on every node to a file with the certificate that signed the server's, or correct "
            "the server's certificate or AWS_ENDPOINT_URL"
        )
    return Permanent(f"{where}: {error}; correct the AWS_* variables, or the files that they name, on every node")


def _shut(body: Any) -> None:
    """End the reading of a body from another thread.

    `shutdown` of an encrypted socket, which urllib3 would call, also ends its decryption: bytes that have come are then read as they are.
    """
    socket.socket.shutdown(body._raw_stream._sock_shutdown.__self__, socket.SHUT_RD)
