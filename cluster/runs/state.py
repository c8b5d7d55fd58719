"""The record of a run in its folder: its lives, and `state.json`.

Each start of a run's driver is a *life* and takes the next number by create, so two drivers never share one. Everything a
life writes carries its number, and a life that sees a newer one stops writing.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.storage import AlreadyExists, NotFound, Stale, Store

STATUSES = ("PENDING", "RUNNING", "STOPPED", "DONE", "FAILED")


class Superseded(RuntimeError):
    """A newer life of this run exists; this one must not write any more."""

    failure = "superseded"


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
            store.create(_key(life), json.dumps(facts, indent=1).encode())
            return life
        except AlreadyExists:
            life += 1


def newest_life(store: Store) -> int:
    """The newest life's number, 0 before the first."""
    return max((int(entry.key.removeprefix("lives/").split("/")[0].removesuffix(".json")) for entry in store.list("lives/")), default=0)


def assert_newest_life(store: Store, life: int) -> None:
    """Check that this life may still write.

    Raises:
        Superseded: if a newer one has begun.
    """
    if (other := newest_life(store)) > life:
        raise Superseded(f"life {other} of {store.url} has begun; life {life} stops without writing any more")


def read_state(store: Store) -> State | None:
    """The run's state, None before its first start."""
    try:
        return State(**json.loads(store.read("state.json")))
    except NotFound:
        return None


def write_state(store: Store, state: State) -> None:
    """Make this the run's state, unless a newer life has written one.

    Raises:
        Superseded: if one has.
    """
    data = json.dumps(asdict(state), indent=1).encode()
    while True:
        try:
            now, etag = store.get("state.json")
        except NotFound:
            try:
                store.create("state.json", data)
                return
            except AlreadyExists:
                continue
        if (other := json.loads(now)["life"]) > state.life:
            raise Superseded(f"life {other} of {store.url} owns state.json; life {state.life} stops without writing any more")
        try:
            store.replace("state.json", data, etag)
            return
        except Stale:
            continue


def update_state(store: Store, state: State, **changes: Any) -> State:
    """Write a changed state and return it."""
    changed = replace(state, **changes)
    write_state(store, changed)
    return changed


def _key(life: int) -> str:
    return f"lives/{life:06d}.json"
