"""Objects that are compared with the hash of their content when they are read."""

import logging

from cluster.storage.base import StorageError, Store, content_hash

log = logging.getLogger(__name__)


class HashMismatch(StorageError):
    """The hash of an object is not the one that it was written with.

    Attributes:
        actual: the hash of what was read.
    """

    def __init__(self, where: str, expected: str, actual: str):
        super().__init__(where, expected, actual)
        self.where, self.expected, self.actual = where, expected, actual

    def __str__(self) -> str:
        return f"{self.where} has hash {self.actual}, but was written with {self.expected}"


def read_verified(store: Store, key: str, digest: str) -> bytes:
    """An object's whole content, compared with its hash; if that differs, it is read once more: bytes can be damaged on their way.

    Raises:
        NotFound: if there is none.
        HashMismatch: if it differs both times.
    """
    actual = ""
    for _ in range(2):
        if actual:
            log.warning("%s/%s came with hash %s, but was written with %s; reading it once more", store.url, key, actual, digest)
        data = store.read(key)
        if (actual := content_hash(data)) == digest:
            return data
        del data  # so that a part of a checkpoint is not in memory twice
    raise HashMismatch(f"{store.url}/{key}", digest, actual)
