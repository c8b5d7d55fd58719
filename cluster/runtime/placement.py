"""Room for ranks that start together: who has it now, waiting for it without end, and refusing what can never come.

What is waited for is a placement group of ours: Ray reserves it as soon as there is room, and to an autoscaler it is what is asked for.
It is given back the moment before the ranks are placed, on the machines that it was on. The class of its number is private in Ray 2.56.
"""

import datetime
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
from ray._raylet import PlacementGroupID
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cluster.runtime.autoscaler import autoscaler, machines_by_hand
from cluster.runtime.nodes import NODE_ID, Node, is_private, nodes

MEMORY = "memory"
"""Ray's name for the bytes of a machine's memory that ranks may have."""

POLL = 0.25
"""Seconds between two looks whether there is room."""

RESERVED = 0.05
"""Seconds after which what there is room for is reserved."""

FRESH = 1.5
"""Seconds after which what is free is known to be without what was just reserved."""

CHECK = 10.0
"""Seconds after which who waits looks again whether what is waited for can ever come."""

SETTLE = 3.0
"""Seconds in which what others have just given back becomes known; before, fewer ranks than the most do not start."""


class NoPlace(RuntimeError):
    """There was no room for the ranks for as long as the run may wait."""

    failure = "no_place"


@dataclass(frozen=True)
class Gang:
    """Ranks that start together or not at all.

    Attributes:
        least: fewer do not start.
        most: more do not start.
        resources: of one rank, by Ray's names.
        per_host: most on one machine, 0: as many as it has room for.
        labels: that a machine must have.
        memory: bytes of its machine's memory that a rank needs where there are so many; None: nobody knows.
        owner: whose they are; what another driver has reserved for it is withdrawn.
        avoid: tells the machines, by Ray's ids, that get none of them now.
    """

    least: int
    most: int
    resources: Mapping[str, float]
    per_host: int = 0
    labels: Mapping[str, str] | None = None
    memory: Callable[[int], int] | None = None
    owner: str = ""
    avoid: Callable[[], frozenset[str]] = frozenset

    def each(self, ranks: int) -> dict[str, float]:
        """What one of so many ranks needs."""
        return {**self.resources, **({MEMORY: float(self.memory(ranks))} if self.memory else {})}

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        spread = f", at most {self.per_host} a machine" if self.per_host else ""
        where = ", on machines with " + ", ".join(f"{k}={v}" for k, v in self.labels.items()) if self.labels else ""
        return f"{count} rank{'' if count == '1' else 's'} ({each} each{spread}{where})"


def fit(gang: Gang, there: Sequence[Node]) -> list[str]:
    """The machine of each rank, for as many ranks as there is room for now: machines with the most room first, ranks of one together."""
    avoided = gang.avoid()
    able = [node for node in there if not node.draining and node.id not in avoided and _labelled(gang, node)]
    most = min(gang.most, sum(_room(gang, gang.resources, node) for node in able))
    for count in range(most, 0, -1):  # where memory is asked for, fewer ranks need more of it each
        rooms = [(_room(gang, gang.each(count), node), node.id) for node in able]
        found = [node for room, node in sorted(rooms, key=lambda pair: (-pair[0], pair[1])) for _ in range(room)]
        if len(found) >= count:
            return found[:count]
    return []


def has_room_without(gang: Gang) -> bool:
    """Whether the machines that are there, but for those that the gang avoids, have room for the fewest ranks when nobody else uses them.

    Raises:
        RayError: if the cluster does not answer.
    """
    return len(fit(replace(gang, memory=None), [replace(node, free=node.total) for node in nodes()])) >= gang.least


def _room(gang: Gang, each: Mapping[str, float], node: Node) -> int:
    room = min(int((node.free.get(name, 0.0) + 1e-6) / amount) for name, amount in each.items() if amount)
    return min(room, gang.per_host) if gang.per_host else room


def _labelled(gang: Gang, node: Node) -> bool:
    return all(node.labels.get(name) == value for name, value in (gang.labels or {}).items())


def assert_possible(gang: Gang) -> None:
    """Refuse what can never come: more than a private Ray of this machine has, or than the autoscaler may ever start.

    A cluster that somebody started by hand may grow, so there it is waited.

    Raises:
        ValueError: with the numbers.
    """
    if is_private():
        there = [replace(node, free=node.total, draining=False) for node in nodes()]
        room = len(fit(replace(gang, memory=None), there))
        if gang.memory and room >= gang.least > len(fit(gang, there)):
            need, free = gang.least * gang.memory(gang.least), sum(node.total.get(MEMORY, 0.0) for node in there)
            what = f"{gang} need {need / 1e9:.1f} GB of memory for weights, gradients and moments, and this machine"
            if need > (physical := psutil.virtual_memory().total):
                raise ValueError(f"{what} has {physical / 1e9:.1f} GB: raise workers.zero or join a cluster (RAY_ADDRESS)")
            raise NoPlace(f"{what} had {free / 1e9:.1f} GB free when its Ray started")
        if room < gang.least:
            has = ", ".join(f"{sum(node.total.get(name, 0.0) for node in there):g} {name}" for name in gang.resources)
            raise ValueError(
                f"the Ray of this machine alone has {has}, which is room for {room} of {gang}: lower workers.count, workers.cpus or "
                "workers.gpu, or join a cluster (`ray start --head`, RAY_ADDRESS)"
            )
    elif ever := _machines_ever(gang):
        if (room := len(fit(replace(gang, memory=None), ever))) < gang.least:
            raise ValueError(
                f"{gang} find room for {room} on all machines that this cluster and its autoscaler may ever have ({_kinds(gang, ever)}): "
                "lower workers.count or workers.cpus, raise workers.per_host, or give the autoscaler larger machines or more of them "
                "(max_workers)"
            )


def _machines_ever(gang: Gang) -> list[Node]:
    """The machines on which ranks may ever have most room, where an autoscaler says what it may start; else none."""
    scaler = autoscaler()
    if scaler is None or not scaler.types:
        return []
    new = sorted(scaler.machines(), key=lambda one: -_room(gang, gang.resources, one) * _labelled(gang, one))
    return [*machines_by_hand(scaler), *new[: scaler.most]]


def _kinds(gang: Gang, ever: Sequence[Node]) -> str:
    """So many machines of each kind, with what the gang asks for."""
    kinds = Counter(
        (one.name if not one.address else "already there", ", ".join(f"{one.total.get(name, 0.0):g} {name}" for name in gang.resources))
        for one in ever
    )
    return "; ".join(f"{count} {kind} with {each}" for (kind, each), count in kinds.items())


def gangs_at_once(gang: Gang) -> int:
    """How many gangs of the fewest ranks have room beside each other on the machines that are there, or that the autoscaler may start.

    At least 1: what has no room yet is waited for.
    """
    there = _machines_ever(gang) or [replace(node, free=node.total, draining=False) for node in nodes()]
    ranks = len(fit(replace(gang, most=sum(int(max(node.total.values())) for node in there), per_host=0, memory=None), there))
    return max(1, ranks // gang.least)


class Demand:
    """A reservation for so many ranks of a gang, which Ray fills as soon as there is room."""

    def __init__(self, gang: Gang, ranks: int):
        hosts = [gang.per_host] * (ranks // gang.per_host) + [ranks % gang.per_host] if gang.per_host else [1] * ranks
        self._hosts = [count for count in hosts if count]
        selector = dict(gang.labels or {})
        if avoided := gang.avoid():
            selector[NODE_ID] = f"!in({','.join(sorted(avoided))})"  # a space would be part of a name
        self._group = placement_group(
            [{name: count * amount for name, amount in gang.each(ranks).items()} for count in self._hosts],
            strategy="STRICT_SPREAD" if gang.per_host else "PACK",
            bundle_label_selector=[selector] * len(self._hosts) if selector else None,
            name=f"{gang.owner} {uuid.uuid4().hex}",
        )

    def place(self) -> list[str] | None:
        """The machine of each rank, None while there is no room for all."""
        table = placement_group_table(self._group)
        if table.get("state") != "CREATED":
            return None
        machines = table["bundles_to_node_id"]
        return sorted(machines[number] for number, count in enumerate(self._hosts) for _ in range(count))

    def remove(self) -> None:
        """Give it back."""
        remove_placement_group(self._group)


def withdraw_demands(owner: str) -> None:
    """Give back what was reserved for an owner: its driver may stand still, and would keep it from the next one."""
    for number, known in placement_group_table().items():
        if known["name"].startswith(f"{owner} ") and known["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))


def wait_for_place(
    gang: Gang,
    limit: float,
    report: Callable[[float, str], None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Wait until a gang has room, however long that takes.

    Args:
        gang: what is to be placed.
        limit: seconds after which it is given up; 0: never.
        report: told all the time, with the seconds waited so far, what is waited for; may raise to end the wait.
        clock: seconds that only grow.
        pause: waits so many seconds.

    Returns:
        The machine of each rank, for as many as there is room for. Nothing is reserved any more.

    Raises:
        ValueError: as `assert_possible`.
        NoPlace: if the limit is over.
        RayError: if the cluster does not answer.
    """
    assert_possible(gang)
    since = datetime.datetime.now().strftime("%H:%M:%S")
    if gang.owner:
        withdraw_demands(gang.owner)
    wait = _Wait(gang, clock, pause)
    try:
        while (place := wait.place()) is None:
            text = f"waiting since {since} for room for {gang}: {_what_is_there(gang, nodes())}"
            if limit and wait.seconds >= limit:
                raise NoPlace(f"{text}; given up after {limit / 60:g} minutes (run.wait_minutes)")
            report(wait.seconds, text)
            wait.long = True
            pause(POLL)
        return place
    finally:
        wait.give_up()


class _Wait:
    """A wait for room: what Ray is asked for, and since when.

    Attributes:
        long: whether there was no room at first, so that machines may have come since.
    """

    def __init__(self, gang: Gang, clock: Callable[[], float], pause: Callable[[float], None]):
        self._gang, self._clock, self._pause = gang, clock, pause
        self._began = self._checked = clock()
        self._asked, self._ranks = _to_ask_for(gang), 0
        self._demand: Demand | None = None
        self.long = False

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self._clock() - self._began

    def place(self) -> list[str] | None:
        """The machine of each rank, None while there is no room."""
        asked = self._ask_now()
        while (wanted := max(self._gang.least, len(fit(self._gang, nodes())))) < self._gang.most and self.seconds < SETTLE:
            self._pause(POLL)
        if self._demand is None or ((wanted, asked) != (self._ranks, self._asked) and self._demand.place() is None):
            self._ask(asked, wanted)
        while self._demand and (place := self._demand.place()):
            if not self._asked.memory and not _has_memory(self._gang, place, nodes()):
                return None
            if not (more := self._more()):
                return place
            self._ask(self._asked, self._ranks + more)
        return None

    def give_up(self) -> None:
        """Ray is asked for nothing any more."""
        if self._demand:
            self._demand.remove()
            self._demand = None

    def _ask_now(self) -> Gang:
        """What is to be asked for, looked at again at times: an autoscaler starts later than its head."""
        if self._clock() - self._checked <= CHECK:
            return self._asked
        assert_possible(self._gang)
        self._checked = self._clock()
        return _to_ask_for(self._gang)

    def _ask(self, asked: Gang, ranks: int) -> None:
        self.give_up()
        self._demand, self._asked, self._ranks = Demand(asked, ranks), asked, ranks
        self._pause(RESERVED)

    def _more(self) -> int:
        """For how many more ranks there is room: a machine that came may have it for more than was asked for."""
        if not self.long or self._ranks == self._gang.most:
            return 0
        self._pause(FRESH)
        return len(fit(replace(self._gang, most=self._gang.most - self._ranks), nodes()))


def _to_ask_for(gang: Gang) -> Gang:
    """Without memory where an autoscaler's types do not tell theirs, as on most clouds: it would start nothing."""
    scaler = autoscaler()
    return gang if scaler is None or MEMORY in scaler.counts else replace(gang, memory=None)


def _has_memory(gang: Gang, place: Sequence[str], there: Sequence[Node]) -> bool:
    """Whether machines have the memory that ranks there need."""
    each = gang.memory(len(place)) if gang.memory else 0
    free = {node.id: node.free.get(MEMORY, 0.0) for node in there}
    return all(count * each <= free.get(node, 0.0) for node, count in Counter(place).items())


def _what_is_there(gang: Gang, there: Sequence[Node]) -> str:
    able = [node for node in there if _labelled(gang, node)]
    free = ", ".join(
        f"{sum(node.free.get(name, 0.0) for node in able):g} of {sum(node.total.get(name, 0.0) for node in able):g} {name}"
        for name in gang.resources
    )
    if gang.memory:
        most = max((node.free.get(MEMORY, 0.0) for node in able), default=0.0)
        free += f", memory of one at most {most / 1e9:.1f} GB where a rank of {gang.least} needs {gang.memory(gang.least) / 1e9:.1f} GB"
    leaving = sum(node.draining for node in able)
    return f"{len(able)} machine{'' if len(able) == 1 else 's'}{f', {leaving} of them about to go' * bool(leaving)}, free {free}"
