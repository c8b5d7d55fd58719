"""Which machines ranks are placed on, and what is refused."""

import time
from dataclasses import replace

import pytest

from cluster.runtime import placement
from cluster.runtime.autoscaler import Autoscaler, MachineType
from cluster.runtime.nodes import Node
from cluster.runtime.placement import (
    Demand,
    Gang,
    NoPlace,
    assert_possible,
    fit,
    gangs_at_once,
    has_room_without,
    wait_for_place,
    withdraw_demands,
)


def node(name: str, cpus: float, free: float | None = None, draining: bool = False, **labels: str) -> Node:
    return Node(name, f"10.0.0.{name}", name, labels, {"CPU": cpus}, {"CPU": cpus if free is None else free}, draining)


ONE_CPU = {"CPU": 1.0}


def test_ranks_are_packed_on_machines_with_the_most_room() -> None:
    assert fit(Gang(1, 5, ONE_CPU), [node("1", 1), node("2", 4), node("3", 2)]) == ["2", "2", "2", "2", "3"]


def test_a_machine_that_will_be_taken_away_has_no_room() -> None:
    assert fit(Gang(1, 5, ONE_CPU), [node("1", 1), node("2", 4, draining=True)]) == ["1"]


def test_one_rank_a_machine_can_be_asked_for_and_labels() -> None:
    there = [node("1", 4, pool="gpu"), node("2", 4), node("3", 4, pool="gpu")]
    assert fit(Gang(1, 5, ONE_CPU, per_host=1), there) == ["1", "2", "3"]
    assert fit(Gang(1, 5, ONE_CPU, per_host=2, labels={"pool": "gpu"}), there) == ["1", "1", "3", "3"]


def test_only_what_nobody_has_reserved_is_room() -> None:
    assert fit(Gang(1, 9, {"CPU": 1.5}), [node("1", 8, free=3.1)]) == ["1", "1"]


def test_machines_that_a_gang_avoids_get_no_rank_and_whether_it_can_do_without_them_is_known(cluster: dict) -> None:
    cluster["nodes"] = [node("1", 1), node("2", 4, free=0), node("3", 2)]
    careful = Gang(3, 5, ONE_CPU, avoid=lambda: frozenset("3"))
    assert fit(careful, cluster["nodes"]) == ["1"] and has_room_without(careful), "somebody has the second one now"
    assert not has_room_without(replace(careful, avoid=lambda: frozenset("23")))


def with_memory(name: str, cpus: float, memory: float) -> Node:
    has = {"CPU": cpus, "memory": memory}
    return replace(node(name, cpus), total=has, free=has)


def sharded(ranks: int) -> int:
    """Bytes of a rank: 2 that each has, 12 that all share."""
    return 2 + 12 // ranks


def test_so_many_ranks_start_as_their_machines_have_memory_for() -> None:
    gang = Gang(1, 4, ONE_CPU, memory=sharded)
    assert fit(gang, [with_memory("1", 4, 100)]) == ["1"] * 4
    assert fit(gang, [with_memory("1", 4, 18)]) == ["1"] * 3, "4 x 5 are too many, 3 x 6 are not"
    assert fit(gang, [with_memory("1", 1, 8), with_memory("2", 1, 8)]) == ["1", "2"], "each has 8 for the other's half"
    assert fit(gang, [with_memory("1", 4, 10), with_memory("2", 4, 12)]) == ["1", "1", "2", "2"], "one has memory for two"
    assert fit(gang, [with_memory("1", 1, 8)]) == [], "alone it would need 14"


def test_a_size_that_has_too_little_memory_is_waited_out_until_machines_come(cluster: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "Demand", There)
    cluster["nodes"], There.cluster, now, told = [with_memory("1", 1, 8e9)], cluster, [0.0], []

    def pause(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 60:
            cluster["nodes"] = [with_memory("1", 1, 8e9), with_memory("2", 1, 8e9)]

    gang = Gang(1, 4, ONE_CPU, memory=lambda ranks: sharded(ranks) * 10**9)
    assert wait_for_place(gang, 0, lambda waited, text: told.append(text), lambda: now[0], pause) == ["1", "2"]
    assert now[0] > 60 and "memory of one at most 8.0 GB where a rank of 1 needs 14.0 GB" in told[-1]


def test_a_private_ray_with_too_little_memory_is_refused_or_may_be_tried_later(cluster: dict) -> None:
    cluster["private"], cluster["nodes"] = True, [with_memory("1", 4, 8e6)]
    with pytest.raises(ValueError, match=r"2 ranks .* need 2000000.0 GB of memory .* this machine has .* raise workers.zero"):
        assert_possible(Gang(2, 2, ONE_CPU, memory=lambda ranks: 10**15))
    with pytest.raises(NoPlace, match=r"had 0.0 GB free when its Ray started"):
        assert_possible(Gang(2, 2, ONE_CPU, memory=lambda ranks: 10**7))


class There:
    """A reservation that is filled at once, where there is room, and takes it from the others."""

    cluster: dict

    def __init__(self, gang: Gang, ranks: int):
        self._gang, self._ranks = replace(gang, most=ranks), ranks

    def place(self) -> list[str] | None:
        found = fit(self._gang, self.cluster["nodes"])
        if len(found) < self._ranks:
            return None
        self.cluster["held"] = [(node, self._gang.each(self._ranks)) for node in found]
        return found

    def remove(self) -> None:
        self.cluster["held"] = []


def free(cluster: dict) -> list[Node]:
    """The machines less what is reserved."""
    there = {one.id: one for one in cluster["nodes"]}
    for name, amounts in cluster["held"]:
        there[name] = replace(there[name], free={key: amount - amounts.get(key, 0.0) for key, amount in there[name].free.items()})
    return list(there.values())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A cluster as it is told here."""
    facts: dict = {"private": False, "scaler": None, "nodes": [node("1", 2)], "held": []}
    monkeypatch.setattr(placement, "is_private", lambda: facts["private"])
    monkeypatch.setattr(placement, "autoscaler", lambda: facts["scaler"])
    monkeypatch.setattr(placement, "machines_by_hand", lambda _: facts["nodes"])
    monkeypatch.setattr(placement, "nodes", lambda: free(facts))
    return facts


def test_more_than_a_private_ray_has_is_refused_at_once_with_the_numbers(cluster: dict) -> None:
    cluster["private"] = True
    assert_possible(Gang(2, 2, ONE_CPU))
    with pytest.raises(ValueError, match=r"has 2 CPU, which is room for 2 of 3 ranks \(1 CPU each\): lower workers.count"):
        assert_possible(Gang(3, 3, ONE_CPU))
    cluster["nodes"] = [node("1", 2, free=0)]
    assert_possible(Gang(2, 2, ONE_CPU))  # busy is not lacking


def scaler(most: int, **types: tuple[int, dict[str, float]]) -> Autoscaler:
    """Each type with its name as the label `pool`."""
    return Autoscaler(tuple(MachineType(name, has, count, {"pool": name}) for name, (count, has) in types.items()), most)


def test_more_than_the_autoscaler_may_have_is_refused_with_the_numbers(cluster: dict) -> None:
    cluster.update(nodes=[node("head", 0)], scaler=scaler(9, gpu=(4, {"CPU": 8.0, "GPU": 1.0}), cpu=(9, {"CPU": 2.0})))
    assert_possible(Gang(4, 9, {"CPU": 2.0, "GPU": 1.0}, labels={"pool": "gpu"}))
    assert_possible(Gang(42, 42, ONE_CPU))  # four of the large and, of nine in all, five of the small
    with pytest.raises(ValueError, match=r"5 ranks .* room for 4 .*\(.*4 gpu with 8 CPU, 1 GPU; .*lower workers.count"):
        assert_possible(Gang(5, 5, {"CPU": 1.0, "GPU": 1.0}))
    with pytest.raises(ValueError, match=r"43 ranks .* room for 42 "):
        assert_possible(Gang(43, 43, ONE_CPU))
    with pytest.raises(ValueError, match=r"1 rank \(16 CPU each\) find room for 0 .*lower workers.count or workers.cpus"):
        assert_possible(Gang(1, 1, {"CPU": 16.0}))
    with pytest.raises(ValueError, match=r"10 ranks .* at most 1 a machine.* find room for 9 "):
        assert_possible(Gang(10, 10, ONE_CPU, per_host=1))
    assert_possible(Gang(32, 32, ONE_CPU, labels={"pool": "gpu"}))
    with pytest.raises(ValueError, match=r"33 ranks .*on machines with pool=gpu\) find room for 32 "):
        assert_possible(Gang(33, 33, ONE_CPU, labels={"pool": "gpu"}))
    with pytest.raises(ValueError, match=r"on machines with pool=large\) find room for 0 "):
        assert_possible(Gang(1, 1, ONE_CPU, labels={"pool": "large"}))
    cluster["nodes"] = [node("head", 2)]
    assert_possible(Gang(44, 44, ONE_CPU))  # what is there already counts, too


def test_an_autoscaler_that_tells_nothing_of_memory_or_of_itself_is_not_asked_for_memory(
    cluster: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Gang] = []

    class Asked(There):
        def __init__(self, gang: Gang, ranks: int):
            asked.append(gang)
            super().__init__(gang, ranks)

    monkeypatch.setattr(placement, "Demand", Asked)
    monkeypatch.setattr(placement, "nodes", lambda: there[0])
    cluster["nodes"] = [with_memory("1", 4, 8e9)]
    There.cluster, there, told = cluster, [cluster["nodes"]], []
    gang = Gang(1, 1, ONE_CPU, memory=lambda _: int(4e9))
    without, with_it = scaler(9, cpu=(9, {"CPU": 2.0})), scaler(9, cpu=(9, {"CPU": 2.0, "memory": 8e9}))
    for cluster["scaler"], told_of in ((None, True), (Autoscaler(), False), (without, False), (with_it, True)):
        assert wait_for_place(gang, 0, lambda *_: None) == ["1"]
        assert bool(asked.pop().memory) is told_of and not asked
    there[0] = [with_memory("1", 4, 2e9)]  # a machine came, and has too little
    cluster["scaler"], now = without, [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 60:
            there[0] = cluster["nodes"]

    assert wait_for_place(gang, 0, lambda waited, text: told.append(text), lambda: now[0], pause) == ["1"]
    assert now[0] > 60 and "memory of one at most 2.0 GB where a rank of 1 needs 4.0 GB" in told[-1]


def test_of_a_machine_that_comes_all_is_used_and_not_only_what_the_fewest_ranks_had_asked_for(
    cluster: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, all_of_it = [0.0], [node("1", 4)]

    def pause(seconds: float) -> None:
        now[0] += seconds
        cluster["nodes"] = all_of_it if now[0] > 20 else []

    monkeypatch.setattr(placement, "Demand", There)
    There.cluster = cluster
    for most, used in ((8, 4), (3, 3)):
        cluster["nodes"], now[0] = [], 0.0
        assert wait_for_place(Gang(1, most, ONE_CPU), 0, lambda *_: None, lambda: now[0], pause) == ["1"] * used
        assert now[0] > 20 and not cluster["held"]


def test_an_autoscaler_that_reports_late_is_asked_while_its_cluster_is_waited_for(cluster: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pause(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 5:
            cluster["scaler"] = scaler(2, cpu=(2, {"CPU": 1.0}))

    monkeypatch.setattr(placement, "Demand", There)
    There.cluster = cluster
    with pytest.raises(ValueError, match=r"5 ranks .* room for 4 "):
        wait_for_place(Gang(5, 5, ONE_CPU), 0, lambda *_: None, lambda: now[0], pause)
    assert 10 < now[0] < 12


def test_a_cluster_started_by_hand_may_grow_so_nothing_is_refused(cluster: dict) -> None:
    assert_possible(Gang(100, 100, {"CPU": 1.0, "GPU": 8.0}))


def test_as_many_gangs_run_at_once_as_the_machines_have_room_for_busy_or_not(cluster: dict) -> None:
    cluster.update(private=False, nodes=[node("1", 4, free=0), node("2", 3), node("3", 9, pool="driver", draining=True)])
    assert gangs_at_once(Gang(2, 2, ONE_CPU)) == 8
    assert gangs_at_once(Gang(2, 4, {"CPU": 2.0})) == 3
    assert gangs_at_once(Gang(2, 2, ONE_CPU, labels={"pool": "driver"})) == 4
    assert gangs_at_once(Gang(64, 64, ONE_CPU)) == 1, "what has no room yet is waited for"


def test_an_autoscaler_s_maximum_is_what_counts_where_there_is_one(cluster: dict) -> None:
    cluster.update(private=False, nodes=[node("1", 2)], scaler=scaler(10, gpu=(6, {"CPU": 8.0, "GPU": 1.0})))
    assert gangs_at_once(Gang(2, 2, ONE_CPU)) == 25
    assert gangs_at_once(Gang(2, 2, {"CPU": 4.0, "GPU": 1.0})) == 3
    assert gangs_at_once(Gang(2, 2, {"CPU": 8.0}, labels={"pool": "gpu"})) == 3
    assert gangs_at_once(Gang(2, 2, {"CPU": 8.0}, labels={"pool": "large"})) == 1


def test_a_wait_tells_what_for_and_is_given_up_after_its_limit(cluster: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        made = removed = 0

        def __init__(self, gang: Gang, ranks: int):
            Never.made += 1

        def place(self) -> None:
            return None

        def remove(self) -> None:
            Never.removed += 1

    monkeypatch.setattr(placement, "Demand", Never)
    now, told = [0.0], []

    def pause(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(NoPlace, match=r"given up after 2 minutes \(run.wait_minutes\)"):
        wait_for_place(Gang(3, 3, ONE_CPU), 120, lambda waited, text: told.append((waited, text)), lambda: now[0], pause)
    assert 119 < told[-1][0] < 120 and "room for 3 ranks (1 CPU each): 1 machine, free 2 of 2 CPU" in told[-1][1]
    assert Never.made == Never.removed > 0, "nothing stays reserved"


def test_what_a_driver_that_stands_still_has_reserved_is_given_back_by_the_next_one_of_the_same_run(local_ray: object) -> None:
    frozen, other = Demand(Gang(1, 1, ONE_CPU, owner="s3://lab/runs/a"), 1), Demand(Gang(1, 1, ONE_CPU, owner="s3://lab/runs/a-b"), 1)
    try:
        while not (frozen.place() and other.place()):
            time.sleep(0.01)
        withdraw_demands("s3://lab/runs/a")
        assert frozen.place() is None and other.place()
    finally:
        other.remove()


def test_ray_reserves_nothing_on_a_machine_that_is_avoided(local_ray: object) -> None:
    (here,) = placement.nodes()
    avoided, other = (Demand(Gang(1, 1, ONE_CPU, avoid=lambda name=name: frozenset({name, "0"})), 1) for name in (here.id, "00"))
    try:
        while not other.place():
            time.sleep(0.01)
        assert other.place() == [here.id] and avoided.place() is None
    finally:
        other.remove()
        avoided.remove()
