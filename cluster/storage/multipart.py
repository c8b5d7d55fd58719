"""A large object is written in parts: each is tried again by itself, and several are on their way at a time."""

import contextlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.storage.base import NotFound, Permanent, StorageError

PART_BYTES = 16 << 20
"""Bytes of one part; what is no larger is written at once."""

MAX_PARTS = 10_000
"""Parts that an object may have; of a larger object they are larger."""

CONCURRENT_PARTS = min(8, 2 * len(os.sched_getaffinity(0)))
"""Parts that are sent at a time, and held in memory."""


def upload(call: Callable[..., Any], size: int, piece: Callable[[int, int], bytes]) -> None:
    """Write an object, which is there when all of it is.

    Args:
        call: the operation of this name on the object, tried until it is answered.
        size: bytes of the object.
        piece: its bytes from one place to another.

    Raises:
        StorageError: if it cannot be written, or the server forgot what came of it. Parts that came are forgotten, if the server
            can still be asked to.
    """
    if size <= PART_BYTES:
        call("put_object", Body=piece(0, size))
        return
    writer, part = uuid.uuid4().hex, max(PART_BYTES, -(-size // MAX_PARTS))
    upload = call("create_multipart_upload", Metadata={"writer": writer})["UploadId"]

    def send(number: int) -> dict[str, Any]:
        body = piece((number - 1) * part, min(number * part, size))
        return {"PartNumber": number, "ETag": call("upload_part", Body=body, UploadId=upload, PartNumber=number)["ETag"]}

    try:
        with ThreadPoolExecutor(CONCURRENT_PARTS, thread_name_prefix="upload") as pool:
            parts = list(pool.map(send, range(1, -(-size // part) + 1)))
        try:
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
        except NotFound:  # the upload is not known any more
            if etag_if_by(writer, call) is None:
                raise
    except NotFound as error:  # to write it again may help
        raise StorageError(str(error)) from error
    except BaseException as error:
        if isinstance(error, Permanent) or not isinstance(error, StorageError):  # else nobody answers
            with contextlib.suppress(StorageError):
                call("abort_multipart_upload", UploadId=upload)
        raise


def etag_if_by(writer: str, call: Callable[..., Any]) -> str | None:
    """The etag of an object that this writer wrote: then not its write was lost, but the answer."""
    with contextlib.suppress(NotFound):
        head = call("head_object")
        if head["Metadata"].get("writer") == writer:
            return head["ETag"]
    return None
