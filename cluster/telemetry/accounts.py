"""The accounts of what a run holds: the ranks of a group, places in which nobody works, and the tasks of a step."""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.telemetry.books import NO_FAULT, Berth, Books, HeldPlace
from cluster.telemetry.meter import Snapshot, state_of


class GroupBooks:
    """The places of a worker group's ranks, from when Ray is asked for them until it has them back.

    Args:
        books: of the life.
        stage: that they train.
        berths: of each rank.
        progress: of the checkpoint that they go on from, in items.
        fault: why they had to be started, if it was for a fault.
        since: Unix time in seconds from which they are held; 0: now.
    """

    def __init__(self, books: Books, stage: str, berths: Sequence[Berth], progress: float, fault: str = NO_FAULT, since: float = 0.0):
        self._books, self._stage = books, stage
        self._held = [HeldPlace(books, stage, berth, "recovery" if fault else "starting", fault) for berth in berths]
        for held in self._held:
            held.at = min(held.at, round(1000 * since) or held.at)
        self._without = 0.0
        self._begin(progress)

    def _begin(self, progress: float) -> None:
        self._heard: dict[int, Snapshot] = {}
        self._done = dict.fromkeys(range(len(self._held)), progress)
        self._books.reached[self._stage] = progress
        self._books.watch(self._slowest)

    def without(self, seconds: float) -> None:
        """For so many seconds in all, no rank having been heard of since, Ray was asked for the places and had not given them."""
        for held in self._held:
            held.wait(seconds - self._without)
        self._without = max(self._without, seconds)

    def hear(self, snapshot: Snapshot) -> None:
        """A rank has told where its time went."""
        if snapshot["rank"] >= len(self._held):
            return
        now, rank, held = self._books.now(), snapshot["rank"], self._held[snapshot["rank"]]
        before = self._heard.get(rank)
        if before and (before["process"] != snapshot["process"] or before["elapsed"] > snapshot["elapsed"]):
            return
        states = snapshot["totals"]["states"]
        spent = {state: seconds - (before["totals"]["states"][state] if before else 0.0) for state, seconds in states.items()}
        if before is None:  # until there was a process
            spent["starting"] += max(0.0, (now - held.at) / 1000 - sum(spent.values()))
        if held.fault:
            spent["recovery"] = spent.pop("starting")
        held.spend(now, {state: max(0.0, seconds) for state, seconds in spent.items()})
        held.doing = "recovery" if held.fault and snapshot["phase"] == "startup" else state_of(snapshot["phase"])
        self._heard[rank] = snapshot
        if snapshot["steps"] > (before["steps"] if before else 0):
            self._settle(rank, held, snapshot["gauges"].get("progress_items", 0.0))

    def _settle(self, rank: int, held: HeldPlace, progress: float) -> None:
        done = self._done[rank]
        upto, owed = self._books.owing(self._stage, done)
        again = min(1.0, (upto - done) / (progress - done)) if owed and progress > done else float(bool(owed))
        held.settle(again=again, owed=owed)
        self._done[rank] = progress
        self._books.reach(self._stage, max(self._done.values()))

    def lose(self, fault: str, progress: float) -> None:
        """The ranks failed; they are started again on the same places, from a checkpoint at this progress."""
        self._books.owe(self._stage, fault)
        self._books.watched(self._slowest)
        for held in self._held:
            held.doing = "recovery"
            held.spend(self._books.now(), {})
            held.settle(fault)
            held.fault = fault
        self._begin(progress)

    def close(self, fault: str = NO_FAULT, failed: bool = False, until: float = 0.0) -> None:
        """Ray has the places back.

        Args:
            fault: what the ranks ended for, if not since they are done.
            failed: whether they failed, and did not leave at a checkpoint.
            until: Unix time in seconds of when it had them; 0: now.
        """
        self._books.watched(self._slowest)
        if failed and fault:
            self._books.owe(self._stage, fault)
        for held in self._held:
            if not failed:
                held.settle()
            held.doing = "recovery" if fault else "idle"
            held.end(fault, round(1000 * until))
        self._held = []

    def _slowest(self) -> dict[str, Any] | None:
        """The rank that the others waited for, and how many seconds that cost them."""
        waits = {rank: snapshot["totals"]["phases"]["agree"]["seconds"] for rank, snapshot in list(self._heard.items())}
        held = self._held  # the thread that writes the books may ask while the group ends
        if len(waits) < 2 or not held:
            return None
        slowest = min(waits, key=lambda rank: waits[rank])
        cost = sum(seconds - waits[slowest] for seconds in waits.values())
        node = held[slowest].berth.node
        return {"stage": self._stage, "rank": slowest, "node": node, "seconds": round(cost, 3), "ranks": len(waits)}


class PlaceBooks:
    """Places in which nobody works: ranks that there is no room for, or what is reserved before there are ranks for it.

    Args:
        books: of the life.
        stage: that they are for.
        berths: of each; `NOWHERE` for those that wait.
        state: `waiting` or `idle`.
        fault: why ranks had to be started, if it was for a fault.
    """

    def __init__(self, books: Books, stage: str, berths: Sequence[Berth], state: str, fault: str = NO_FAULT):
        self._held = [HeldPlace(books, stage, berth, state, fault) for berth in berths]

    def close(self) -> None:
        """There is room, or it is given up; or the places are given back."""
        for held in self._held:
            held.end()


class TaskBooks:
    """The tasks of a step, one line of the books a call.

    Args:
        books: of the life.
        stage: the step.
        state: of a task that works: `encode` or `evaluate`.
        berth: of a task on a machine, by its address; of an empty one before it is known.
    """

    def __init__(self, books: Books, stage: str, state: str, berth: Callable[[str], Berth]):
        self._books, self._stage, self._state, self._berth = books, stage, state, berth
        self._held: dict[int, HeldPlace] = {}
        self._last = ""

    def begin(self, call: int) -> None:
        """There is room for this call from now on: as far as is known on a machine like that which answered last."""
        self._held[call] = HeldPlace(self._books, self._stage, self._berth(self._last), self._state)

    def end(self, call: int, address: str = "", starting: float = 0.0, working: float = 0.0) -> None:
        """A call is answered, or given up: then its seconds are those since it began.

        Args:
            call: its number.
            address: of the machine that answered.
            starting: seconds that its process took to start.
            working: seconds that it worked.
        """
        held = self._held.pop(call)
        if address:
            self._last, held.berth = address, self._berth(address)
            for other in self._held.values():
                other.berth = other.berth if other.berth.node else held.berth
            held.at = self._books.now() - round(1000 * (starting + working))  # it may have waited among others' tasks
        held.spend(self._books.now(), {"starting": starting, self._state: working})
        held.end()

    def lose(self, call: int, kind: str, text: str, address: str = "") -> None:
        """A call failed, on this machine if that is known, and what it did is lost to a fault of this class."""
        held = self._held.pop(call)
        if address:
            held.berth = self._berth(address)
        held.spend(self._books.now(), {})
        held.settle(self._books.fault(kind, self._stage, text))
        held.end()
