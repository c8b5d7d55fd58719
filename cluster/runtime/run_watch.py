"""A run, looked at from outside: through its own endpoint for Prometheus, which tells about once a second, wherever its driver is."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cluster.runtime.machines import Machine, MachineError

_Clock = Callable[[], float]

POLL = 0.3
"""Seconds between two looks at a run."""

PATIENCE = 300.0
"""Seconds a run is given to come to a step, or to go on, before a test is told that it does not."""

_SAMPLE = re.compile(r"^reactdiff_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Sight(NamedTuple):
    """What a run told at one look.

    Attributes:
        time: of the look, in seconds of the watch's clock.
        life: of the driver.
        restarts: of the worker group in this life.
        stage: that its ranks are in.
        step: optimiser steps behind the state they are in.
        items: trained on in this life and stage, by all ranks, replay included.
        ranks: host and process of each; empty where none has told anything since a restart.
    """

    time: float
    life: int
    restarts: int
    stage: str
    step: int
    items: int
    ranks: Mapping[int, tuple[str, int]]


class Watch:
    """Looks at a run through its endpoint, on whichever machine its driver is.

    Attributes:
        history: all looks that were answered and told something new.
        batch: stage -> items of a step.
    """

    def __init__(self, machines: Callable[[], Sequence[Machine]], batch: Mapping[str, int], targets: str, clock: _Clock = time.monotonic):
        """Look at nothing yet.

        Args:
            machines: where driver and ranks may be, at the time of each look.
            batch: as the attribute.
            targets: folder with the run's Prometheus target, on the driver's machine (`telemetry.targets`).
            clock: in seconds.
        """
        self.history: list[Sight] = []
        self.batch = batch
        self._machines, self._targets, self._clock = machines, targets, clock
        self._endpoint: tuple[Machine, str] | None = None

    def now(self) -> float:
        """The watch's clock."""
        return self._clock()

    def look(self) -> Sight | None:
        """One look; None while no driver answers or no rank has told anything."""
        for machine, address in self._endpoints():
            if text := machine.fetch(f"http://{address}/metrics"):
                self._endpoint = machine, address
                if (sight := _read(text, self._clock(), self.batch)) and (not self.history or sight[1:] != self.history[-1][1:]):
                    self.history.append(sight)
                return sight
        self._endpoint = None
        return None

    def until(self, condition: Callable[[Sight], bool], what: str, seconds: float | None = None) -> Sight:
        """Look until a condition holds, at most `seconds` (PATIENCE).

        Raises:
            MachineError: if it does not, with the last that was seen.
        """
        seconds = PATIENCE if seconds is None else seconds
        end = self._clock() + seconds
        while self._clock() < end:
            sight = self.look()
            if sight and condition(sight):
                return sight
            time.sleep(POLL)
        raise MachineError(f"in {seconds:g} s the run did not come to {what}; last seen: {self.history[-1] if self.history else 'nothing'}")

    def spend(self, seconds: float, ended: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, looking, until something has ended."""
        end = self._clock() + seconds
        while self._clock() < end and not ended():
            self.look()
            time.sleep(POLL)

    def process(self, rank: int) -> tuple[Machine, int]:
        """Machine and process of a rank.

        Raises:
            MachineError: if the run does not tell.
        """
        sight = self.look()
        if not sight or rank not in sight.ranks:
            raise MachineError(f"the run does not tell where rank {rank} is")
        host, pid = sight.ranks[rank]
        return next(machine for machine in self._machines() if machine.name == host), pid

    def driver(self) -> tuple[Machine, int]:
        """Machine and process of the driver, which is who serves the endpoint.

        Raises:
            MachineError: if none answers.
        """
        self.look()
        if not self._endpoint:
            raise MachineError("no driver answers")
        machine, address = self._endpoint
        listening = machine.run("ss", "-ltnpH", f"sport = :{address.rpartition(':')[2]}").stdout
        return machine, int(re.findall(r"pid=(\d+)", listening)[0])

    def _endpoints(self) -> Iterator[tuple[Machine, str]]:
        """Where the driver answered last, then where it may be."""
        if self._endpoint and self._endpoint[0].on:
            yield self._endpoint
        for machine in self._machines():
            if machine.on:
                files = machine.run("sh", "-c", 'cat "$0"/*.json', self._targets, check=False).stdout
                yield from ((machine, address) for address in re.findall(r'"targets": \["([^"]+)"\]', files))


def _read(text: str, now: float, batch: Mapping[str, int]) -> Sight | None:
    """What a scrape says; None before any rank has told something, and where the run trains no stage."""
    samples = [(name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _SAMPLE.findall(text)]
    places = [labels for name, labels, _ in samples if name == "rank_info"]
    told = {labels["stage"] for name, labels, _ in samples if name == "items_processed_total"}
    at = places or [labels for name, labels, value in samples if name == "at" and value and labels["stage"] in told]
    if not at:
        return None
    life, stage = int(at[0]["life"]), at[0]["stage"]

    def number(name: str) -> int:
        return int(sum(value for sample, labels, value in samples if sample == name and labels.get("stage", stage) == stage))

    ranks = {int(place["rank"]): (place["host"], int(place["pid"])) for place in places}
    step = -(-number("progress_items") // batch[stage])
    return Sight(now, life, number("restarts_total"), stage, step, number("items_processed_total"), ranks)


def items_since(then: Sight, now: Sight) -> int:
    """Items trained on between two looks; a new life and a new stage count from 0."""
    same = (then.life, then.stage) == (now.life, now.stage)
    return now.items - (then.items if same else 0)
