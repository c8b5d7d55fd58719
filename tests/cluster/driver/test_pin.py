"""Whose `config.yaml` a run has: of drivers that begin at once one decides, and an older life never puts its own back."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

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


def test_of_first_starts_with_other_identities_one_wins_and_the_others_are_told_what_differs(store: Store) -> None:
    racers = 4
    barrier = Barrier(racers)

    def first_start(number: int) -> str:
        life = open_life(store, {})
        barrier.wait()
        try:
            write_config(experiment(f"seed={number}"), pinned(store), life)
        except (ConfigError, Superseded) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(racers) as pool:
        said = list(pool.map(first_start, range(racers)))
    kept = store.read(CONFIG).decode()
    winners = [number for number in range(racers) if f"\nseed: {number}\n" in kept]
    assert len(winners) == 1
    assert all("exists with another identity; differing: seed (was" in text or "has begun" in text for text in said if text)
    assert said.count("") == 1 or not said.count("")  # the one that wrote it may be told that a newer life has begun


def test_a_later_life_replaces_it_and_an_older_one_that_wakes_does_not(store: Store) -> None:
    first = open_life(store, {})
    write_config(experiment("workers.count=1"), pinned(store), first)
    before, etag = store.get(CONFIG)
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
