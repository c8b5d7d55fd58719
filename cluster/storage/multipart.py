"""Multipart upload to S3: a large object is sent in parts, several at the same time, and each is retried by itself."""

import contextlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.storage.base import NotFound, Permanent, StorageError

PART_BYTES = 16 << 20
"""Bytes of one part; an object that is no larger is written by a single request."""

MAX_PARTS = 10_000
"""Parts that S3 allows an object to have; where there would be more, they are larger."""

CONCURRENT_PARTS = min(8, 2 * len(os.sched_getaffinity(0)))
"""Parts that are sent at the same time, and held in memory."""


def upload(call: Callable[..., Any], size: int, piece: Callable[[int, int], bytes]) -> None:
    """Write an object; it becomes visible as a whole, when the last part is there.

    Args:
        call: calls S3's operation of this name on the object, with retries.
        size: bytes of the object.
        piece: returns its bytes from one offset to another.

    Raises:
        StorageError: if it cannot be written, or the server does not know the upload any more. The upload is aborted then, unless
            the server does not answer.
    """
    if size <= PART_BYTES:
        call("put_object", Body=piece(0, size))
        return
    writer, part = uuid.uuid4().hex, max(PART_BYTES, -(-size // MAX_PARTS))
    upload_id = call("create_multipart_upload", Metadata={"writer": writer})["UploadId"]

    def send(number: int) -> dict[str, Any]:
        body = piece((number - 1) * part, min(number * part, size))
        return {"PartNumber": number, "ETag": call("upload_part", Body=body, UploadId=upload_id, PartNumber=number)["ETag"]}

    try:
        with ThreadPoolExecutor(CONCURRENT_PARTS, thread_name_prefix="upload") as pool:
            parts = list(pool.map(send, range(1, -(-size // part) + 1)))
        try:
            call("complete_multipart_upload", UploadId=upload_id, MultipartUpload={"Parts": parts})
        except NotFound:  # the upload is not known any more: perhaps it was completed, and only the answer was lost
            if etag_if_written_by(writer, call) is None:
                raise
    except NotFound as error:  # not permanent: to write the object again may help
        raise StorageError(str(error)) from error
    except BaseException as error:
        if isinstance(error, Permanent) or not isinstance(error, StorageError):  # else the server does not answer
            with contextlib.suppress(StorageError):
                call("abort_multipart_upload", UploadId=upload_id)
        raise


def etag_if_written_by(writer: str, call: Callable[..., Any]) -> str | None:
    """The etag of an object if this writer wrote it: then the write succeeded and only its answer was lost."""
    with contextlib.suppress(NotFound):
        head = call("head_object")
        if head["Metadata"].get("writer") == writer:
            return head["ETag"]
    return None
