"""Named byte objects with atomic writes: one small interface to folders and S3, with retries, deadlines and hashes.

Imports nothing of this project.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.storage.base import AlreadyExists, BeyondEnd, Entry, NotFound, Permanent, Stale, StorageError, Store, content_hash
from cluster.storage.folder import FolderStore

__all__ = [
    "AlreadyExists",
    "BeyondEnd",
    "Entry",
    "NotFound",
    "Permanent",
    "Stale",
    "StorageError",
    "Store",
    "content_hash",
    "open_store",
]


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
        from cluster.storage.s3 import S3Store  # boto3 is loaded where a bucket is opened

        return S3Store(parts.netloc, parts.path.strip("/"))
    raise ValueError(f"{url!r} is no store: use a folder's path, file:///path or s3://bucket/prefix")
