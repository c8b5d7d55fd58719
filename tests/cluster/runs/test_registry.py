"""The registry on both kinds of store: who is champion, when many decide at once and when they die."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from cluster.runs import registry
from cluster.runs.registry import Decision, Version
from cluster.storage import AlreadyExists, StorageError, Store


def version(name: str) -> Version:
    return Version(run=f"faces-{name}", manifest=name, progress={"diffusion": 6}, weights={"diffusion": "0" * 32})


def promoted(name: str, before: str | None = None) -> Decision:
    return Decision("promoted", version(name), "better", candidate=version(name), before=version(before) if before else None)


def champion(store: Store) -> tuple[int, str]:
    shown = json.loads(store.read("champion.json"))
    return shown["decision"], shown["manifest"]


def test_of_many_that_decide_at_once_exactly_one_wins(store: Store) -> None:
    racers = 6
    barrier = Barrier(racers)

    def decide(number: int) -> bool:
        barrier.wait()
        try:
            registry.append_decision(store, promoted(str(number)), None)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(racers) as pool:
        won = list(pool.map(decide, range(racers)))
    assert won.count(True) == 1
    assert champion(store) == (1, str(won.index(True)))
    assert [entry.key for entry in store.list("decisions/")] == ["decisions/000001.json"]


def test_the_loser_decides_again_against_the_new_champion_and_both_are_kept(store: Store) -> None:
    first = registry.append_decision(store, promoted("a"), None)
    with pytest.raises(AlreadyExists):
        registry.append_decision(store, promoted("b"), None)
    second = registry.append_decision(store, promoted("b", before="a"), first)
    assert (second.number, champion(store)) == (2, (2, "b"))
    assert registry.read_decision(store, 1) == first and registry.newest_decision(store) == second


def test_a_candidate_that_is_kept_out_leaves_the_champion_and_is_remembered(store: Store) -> None:
    first = registry.append_decision(store, promoted("a"), None)
    kept = registry.append_decision(store, Decision("kept", version("a"), "worse", candidate=version("b"), before=version("a")), first)
    assert champion(store) == (2, "a")
    assert registry.decision_on(store, "b") == kept and registry.decision_on(store, "c") is None


def test_a_decision_whose_writer_died_is_shown_by_the_next_tick(store: Store) -> None:
    first = registry.append_decision(store, promoted("a"), None)
    before = store.read("champion.json")
    registry.append_decision(store, promoted("b", before="a"), first)
    store.put("champion.json", before)  # as if it had died between the two writes
    registry.show_champion(store)
    assert champion(store) == (2, "b")


def test_rolling_back_is_a_decision_that_goes_to_the_champion_before(store: Store) -> None:
    first = registry.append_decision(store, promoted("a"), None)
    registry.append_decision(store, promoted("b", before="a"), first)
    assert registry.roll_back(store, "").number == 3
    assert champion(store) == (3, "a")
    with pytest.raises(StorageError, match="no champion before the present one"):
        registry.roll_back(store, "")


def test_after_rolling_back_a_new_champion_gives_way_to_the_one_it_replaced(store: Store) -> None:
    registry.append_decision(store, promoted("b", before="a"), registry.append_decision(store, promoted("a"), None))
    registry.append_decision(store, promoted("c", before="a"), registry.roll_back(store, ""))
    registry.roll_back(store, "")
    assert champion(store) == (5, "a")


def test_an_empty_registry_has_no_champion_to_show_or_take_back(store: Store) -> None:
    registry.show_champion(store)
    assert registry.newest_decision(store) is None and not store.exists("champion.json")
    with pytest.raises(StorageError, match="no champion"):
        registry.roll_back(store, "")


def test_a_decision_of_a_newer_version_is_refused_by_name(store: Store) -> None:
    registry.append_decision(store, promoted("a"), None)
    store.put("decisions/000001.json", json.dumps(json.loads(store.read("decisions/000001.json")) | {"canary": 1}).encode())
    with pytest.raises(
        ValueError, match=rf"{store.url}/decisions/000001.json has canary, which this program does not know: go on with the newer"
    ):
        registry.newest_decision(store)
