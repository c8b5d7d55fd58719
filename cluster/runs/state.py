"""The record of a run in its folder: its lives and their attempts, and `state.json`.

Each start of a run's driver is a *life*, each start of a worker group within it an *attempt*; both take their numbers by create, so no
two ever share one. Everything they write carries the numbers, and one that sees newer ones stops writing.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from cluster.runtime.poller import Poller
from cluster.storage import AlreadyExists, NotFound, Stale, StorageError, Store

STATUSES = ("PENDING", "RUNNING", "STOPPED", "DONE", "FAILED")

SUCCESSOR = 15.0
"""Seconds between two questions whether a newer life has begun."""

NONE_YET = -1
"""The attempt of a life that has started no worker group."""


class Superseded(RuntimeError):
    """A newer life or attempt of this run exists; this one must not write any more."""

    failure = "superseded"


class Attempt(NamedTuple):
    """A worker group: the attempt-th of its life, counted from 0 over all stages. The newer one is the greater."""

    life: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.life:06d}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> "Attempt":
        """Read `<life>.<attempt>`, or `<life>` alone: its attempt is `NONE_YET`.

        Raises:
            ValueError: if it is neither.
        """
        life, _, attempt = text.partition(".")
        return cls(int(life), int(attempt) if attempt else NONE_YET)


@dataclass(frozen=True)
class State:
    """What `state.json` says.

    Attributes:
        status: one of STATUSES.
        life: the life that wrote it.
        stage: what the run was last busy with.
        why: for STOPPED and FAILED, the reason in a sentence.
        dataset: identity of the dataset over its growth.
        manifest: hash of the dataset's state the run is pinned to.
    """

    status: str
    life: int
    dataset: str
    manifest: str
    stage: str = ""
    why: str = ""


def open_life(store: Store, facts: dict[str, Any]) -> int:
    """Take the next life number of a run; `facts` (host, command, placement, ...) are kept with it."""
    life = newest_life(store) + 1
    while True:
        try:
            store.create(f"lives/{life:06d}.json", json.dumps(facts, indent=1).encode())
            return life
        except AlreadyExists:
            life += 1


def read_life(store: Store, life: int) -> dict[str, Any]:
    """What is kept with a life's number; empty where nothing is, as in a store of which only checkpoints were copied."""
    try:
        return json.loads(store.read(f"lives/{life:06d}.json"))
    except (NotFound, ValueError):
        return {}


def newest_life(store: Store) -> int:
    """The newest life's number, 0 before the first."""
    return newest_attempt(store).life


def newest_attempt(store: Store) -> Attempt:
    """The newest attempt of the newest life."""
    names = (entry.key.removeprefix("lives/").removesuffix(".json") for entry in store.list("lives/"))
    return max(map(Attempt.parse, names), default=Attempt(0, NONE_YET))


def assert_newest_life(store: Store, life: int, attempt: int | None = None) -> None:
    """Check that this life, or this attempt of it, may still write.

    Raises:
        Superseded: if a newer one has begun.
    """
    newest = newest_attempt(store)
    if newest.life > life:
        raise Superseded(f"life {newest.life} of {store.url} has begun; life {life} stops without writing any more")
    if attempt is not None and newest > (life, attempt):
        raise Superseded(f"attempt {newest} of {store.url} has begun; {Attempt(life, attempt)} stops without writing any more")


def poll_for_successor(store: Store, life: int) -> Poller[bool]:
    """Asks whether a newer life of this run has begun, which waits for the machines of this one."""
    return Poller(lambda: newest_life(store) > life, SUCCESSOR, StorageError)


def read_state(store: Store) -> State | None:
    """The run's state, None before its first start."""
    try:
        return State(**json.loads(store.read("state.json")))
    except NotFound:
        return None


def write_state(store: Store, state: State) -> None:
    """Make this the run's state, unless a newer life has begun.

    Raises:
        Superseded: if one has.
    """
    data = json.dumps(asdict(state), indent=1).encode()
    while True:
        try:
            now, etag = store.get("state.json")
            written = int(json.loads(now)["life"])
        except NotFound:
            etag, written = "", 0
        if written > state.life:
            raise Superseded(f"life {written} of {store.url} owns state.json; life {state.life} stops without writing any more")
        assert_newest_life(store, state.life)
        try:
            if etag:
                store.replace("state.json", data, etag)
            else:
                store.create("state.json", data)
            return
        except (AlreadyExists, Stale):
            continue


def update_state(store: Store, state: State, **changes: Any) -> State:
    """Write a changed state and return it."""
    changed = replace(state, **changes)
    write_state(store, changed)
    return changed
