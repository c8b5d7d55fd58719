"""Whose `config.yaml` a run has: of drivers that begin at once one decides, and an older life never puts its own back."""

from collections.abc import Callable
from typing import Any

import pytest

from cluster.config.loading import ConfigError, load, to_yaml
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.driver.pin import CONFIG, Pinned, write_config
from cluster.runs.state import Superseded, open_life
from cluster.storage import Store


def pinned(store: Store) -> Pinned:
    manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={})
    return Pinned("twice", store, store, store, manifest, fresh=True)


def experiment(*overrides: str) -> Experiment:
    return load(None, ["run.name=twice", *overrides])


class Slow:
    """A store through which the next create or replace comes late: something else happens before."""

    def __init__(self, store: Store, before: Callable[[], None]):
        self._store, self._before = store, [before]

    def __getattr__(self, name: str) -> Any:
        if name in ("create", "replace") and self._before:
            self._before.pop()()
        return getattr(self._store, name)


@pytest.mark.parametrize("exists", [False, True])
def test_of_starts_at_once_with_other_identities_one_wins_and_the_other_is_told_what_differs(store: Store, exists: bool) -> None:
    if exists:
        write_config(experiment("workers.count=3"), pinned(store), open_life(store, {}))
    life, other = open_life(store, {}), "workers.count=4" if exists else "seed=2"
    slow: Any = Slow(store, lambda: write_config(experiment(other), pinned(store), open_life(store, {})))
    with pytest.raises((ConfigError, Superseded), match="life 3 of" if exists else r"another identity; differing: seed \(was 2, now 1\)"):
        write_config(experiment("seed=0" if exists else "seed=1"), pinned(slow), life)
    assert (b"count: 4" if exists else b"seed: 2") in store.read(CONFIG)


def test_a_later_life_replaces_it_and_an_older_one_that_wakes_does_not(store: Store) -> None:
    first = open_life(store, {})
    write_config(experiment("workers.count=1"), pinned(store), first)
    before = store.read(CONFIG)
    second = open_life(store, {})
    write_config(experiment("workers.count=1"), pinned(store), second)
    after = store.read(CONFIG)
    assert before != after and b"written by life 2" in after, "the same configuration, and yet no older life's compare-and-swap succeeds"
    with pytest.raises(Superseded):
        write_config(experiment("workers.count=1"), pinned(store), first)
    assert store.read(CONFIG) == after


def test_one_that_was_created_meanwhile_is_compared_too(store: Store) -> None:
    life = open_life(store, {})
    store.create(CONFIG, to_yaml(experiment("seed=7")).encode())  # by a driver of the version before
    with pytest.raises(ConfigError, match=r"run twice exists with another identity; differing: seed \(was 7, now 0\)"):
        write_config(experiment(), pinned(store), life)
    write_config(experiment("seed=7", "workers.count=5"), pinned(store), life)
    assert b"count: 5" in store.read(CONFIG)
