"""Which checkpoints of a run count: those of its newest attempt, and those that this one inherited when it began.

A driver that was frozen or cut off, or a rank of a group that was given up, may wake and create one more. It finds itself superseded
afterwards. Either its successor found that checkpoint in time and inherits it, or it is in nobody's inheritance, and no reader takes
it for the run's. It is never deleted by who wrote it, for it cannot know which of the two.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from cluster.runs.state import Attempt, assert_newest_life, newest_attempt
from cluster.storage import AlreadyExists, Permanent, Store

VERSION = 1

LOOKS = 60
"""Looks, a second apart, that a rank has for what its driver has just written: a client of NFS may remember that it was not there."""


def open_attempt(store: Store, life: int) -> int:
    """Take the next attempt number of a life, before each start of a worker group, and record which checkpoints it goes on from.

    They are looked for when the number is taken: whoever commits one later sees the number, and ends.

    Args:
        store: the run's folder.
        life: that starts the group.

    Raises:
        Superseded: if a newer life has begun.
    """
    assert_newest_life(store, life)
    newest = newest_attempt(store)
    attempt = newest.attempt + 1 if newest.life == life else 0
    while True:
        try:
            store.create(f"lives/{Attempt(life, attempt)}.json", b"{}")
            break
        except AlreadyExists:
            attempt += 1
    manifests = [entry.key for entry in store.list("checkpoints/") if is_manifest(entry.key)]
    counted = list(filter(counting(store), manifests))
    store.create(_key(Attempt(life, attempt)), json.dumps({"version": VERSION, "checkpoints": counted}, indent=1).encode())
    return attempt


def assert_sees(store: Store, life: int, attempt: int, pause: Callable[[float], None] = time.sleep) -> None:
    """Make sure that a run's folder is here what it is to its driver: on a machine that lacks a mount it would be an empty one of its own.

    A machine may come at any time, so each rank looks, before it writes anything.

    Raises:
        Permanent: if the attempt's record is not there.
    """
    key = f"lives/{Attempt(life, attempt)}.json"
    for _ in range(LOOKS):
        if store.exists(key):
            return
        pause(1.0)
    raise Permanent(
        f"{platform.node()} does not see {store.url}/{key}, which the run's driver has written: on that machine the folder is another one. "
        "Mount it there as on the others, or use run.store=s3://bucket/prefix"
    )


def counting(store: Store, of: Attempt | None = None) -> Callable[[str], bool]:
    """What tells of a manifest's key whether it counts: for this attempt, or for the newest one that has begun.

    Where no attempt has left a record, all of them count: the run was last written before there were records.

    Raises:
        ValueError: if the record is of another version.
    """
    begun = (Attempt.parse(PurePosixPath(entry.key).stem) for entry in store.list("lineage/"))
    newest = max((one for one in begun if of is None or one <= of), default=None)
    if newest is None:
        return lambda key: True
    record = json.loads(store.read(_key(newest)))
    if record["version"] != VERSION:
        raise ValueError(
            f"{store.url}/{_key(newest)} has version {record['version']}, this program reads version {VERSION}: "
            "go on with the newer program that wrote it"
        )
    inherited = frozenset(record["checkpoints"])
    return lambda key: key in inherited or written_by(key) >= newest


def written_by(key: str) -> Attempt:
    """The attempt whose numbers the key of a manifest or part has; of one that has none, the first there could be."""
    name = PurePosixPath(key).name
    numbers = name.split("-")[1].removesuffix(".json") if is_manifest(key) and "-" in name else name.partition("-")[0]
    try:
        life, attempt = Attempt.parse(numbers)
    except ValueError:
        return Attempt(0, 0)
    return Attempt(life, max(attempt, 0))  # <progress>-<life>.json is of a time before attempts had names


def is_manifest(key: str) -> bool:
    """Whether this is the key of a checkpoint's manifest."""
    return key.endswith(".json")


def newest_first(keys: Iterable[str]) -> list[str]:
    """Manifests in the order they were written, the last one first: a later attempt may have gone on from an earlier progress."""
    return sorted(keys, key=lambda key: (written_by(key), PurePosixPath(key).name), reverse=True)


def _key(attempt: Attempt) -> str:
    return f"lineage/{attempt}.json"
