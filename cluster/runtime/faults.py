"""What can happen to a run: faults by name, asked for as data, done at a step of the run's own, each with proof that it happened.

    watch = Watch(lambda: hosts.all, {"autoencoder": 4}, "/tmp/targets")      # of a run with telemetry.targets=/tmp/targets
    done = Injector(watch, hosts).inject(at(step=7).kill(rank=1))
    watch.spend(60)
    recovery(watch, done)                                                     # noticed and going again, in seconds after it

A fault that did not happen is an error. To a run on this machine itself the faults of processes can be done:
`Watch(lambda: [Machine()], ...)`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from cluster.runtime.hosts import GCS, RAYLET, Host, Hosts
from cluster.runtime.machines import Machine, MachineError, VirtualMachine
from cluster.runtime.run_watch import Sight, Watch, items_since

Story = Iterator[tuple[str, str]]
FaultStory = Callable[["Injector", "Fault"], Story]


@dataclass(frozen=True)
class Fault:
    """What shall happen, and when.

    Attributes:
        kind: its name in `KINDS`.
        step: it comes as soon as the run tells that it has done so many steps.
        stage: of this stage.
        rank: whose process, or whose host.
        seconds: how long it lasts; infinite: for good. Kinds that are over at once do not look at it.
    """

    kind: str
    step: int
    stage: str = "autoencoder"
    rank: int = 0
    seconds: float = math.inf


class Moment:
    """A moment of a run; the kinds of faults are its methods, with `rank` and `seconds` as they are in `Fault`."""

    def __init__(self, step: int, stage: str):
        self._step, self._stage = step, stage

    def __getattr__(self, kind: str) -> Callable[..., Fault]:
        if kind not in KINDS:
            raise AttributeError(f"{kind!r} is no kind of fault; they are {', '.join(KINDS)}")
        return lambda rank=0, seconds=math.inf: Fault(kind, self._step, self._stage, rank, seconds)


def at(step: int, stage: str = "autoencoder") -> Moment:
    """The moment when so many steps of a stage are done: `at(step=7).kill(rank=1)`, `at(step=9).cut(rank=1, seconds=20)`."""
    return Moment(step, stage)


@dataclass(frozen=True)
class Injected:
    """A fault that happened.

    Attributes:
        fault: what was asked for.
        host: where it happened.
        detail: what shows that it did.
        before: the last look before it, at `before.time`.
        time: when it had happened.
        lifted: when it was over, infinite where it is for good.
    """

    fault: Fault
    host: str
    detail: str
    before: Sight
    time: float
    lifted: float


class Recovery(NamedTuple):
    """How a run got over a fault.

    Attributes:
        noticed: seconds from the fault until ranks or driver were started again, infinite where nothing was.
        going: seconds from the fault until the run trained (again), infinite where it was not seen to.
        steps_lost: steps that were done again, from the last that was told before the fault.
    """

    noticed: float
    going: float
    steps_lost: int


def recovery(watch: Watch, done: Injected) -> Recovery:
    """What a watch has seen so far of how its run got over a fault."""
    before, over = done.before, done.lifted if done.lifted < math.inf else done.time
    started = [sight for sight in watch.history if (sight.life, sight.restarts) > (before.life, before.restarts)]
    stood = started[0] if started else [sight for sight in watch.history if sight.time <= over][-1]
    # A rank 0 that has just started has not told its step yet, while others have told their items.
    later = [sight for sight in watch.history if sight.time > stood.time and items_since(stood, sight) > 0 and sight.step > 0]
    noticed = started[0].time - done.time if started else math.inf
    going = later[0].time - done.time if later else math.inf
    lost = 0
    if started and later:
        resumed = later[0].step - items_since(stood, later[0]) // watch.batch[before.stage]
        lost = max(0, before.step - resumed)
    return Recovery(noticed, going, lost)


class Injector:
    """Does faults to a run.

    Attributes:
        watch: looks at the run.
    """

    def __init__(self, watch: Watch, hosts: Hosts | None = None, more: "Mapping[str, FaultStory]" = MappingProxyType({})):
        """Do nothing yet.

        Args:
            watch: looks at the run.
            hosts: that it is on, where it has hosts of its own.
            more: kinds beside those of `KINDS`, of whoever knows more of the run than this module.
        """
        self.watch, self._hosts, self._more = watch, hosts, more
        self._lasting: list[tuple[Fault, Story]] = []

    @property
    def hosts(self) -> Hosts:
        """The hosts of the run.

        Raises:
            MachineError: if it has none of its own.
        """
        if self._hosts is None:
            raise MachineError("this fault needs hosts of namespaces, and the run is on this machine itself")
        return self._hosts

    def host(self, rank: int) -> Host:
        """The host of a rank."""
        return self.hosts.named(self.watch.process(rank)[0].name)

    def inject(self, fault: Fault) -> Injected:
        """Wait for the fault's step, do it, and end it after its seconds, if it is one that ends.

        Raises:
            MachineError: if it did not happen, or its step never came.
        """

        def due(sight: Sight) -> bool:
            return sight.stage == fault.stage and sight.step >= fault.step and fault.rank in sight.ranks

        return self.do(fault, self.watch.until(due, f"step {fault.step} of stage {fault.stage}"))

    def do(self, fault: Fault, before: Sight) -> Injected:
        """Do a fault at once, and end it after its seconds, if it is one that ends.

        Args:
            fault: what; its moment is not waited for.
            before: the last look.

        Raises:
            MachineError: if it did not happen.
        """
        story = {**KINDS, **self._more}[fault.kind](self, fault)
        host, detail = next(story)
        happened, lifted = self.watch.now(), math.inf
        if fault.seconds < math.inf:
            self.watch.spend(fault.seconds)
            next(story, None)
            lifted = self.watch.now()
        self._lasting.append((fault, story))  # or what ends it would be taken away with it
        return Injected(fault, host, detail, before, happened, lifted)

    def lift(self, done: Injected) -> Injected:
        """End a fault that had no end of its own.

        Raises:
            MachineError: if it cannot be ended.
        """
        for story in [story for fault, story in self._lasting if fault is done.fault]:
            next(story, None)
        return replace(done, lifted=self.watch.now())


def _kill(injector: Injector, fault: Fault) -> Story:
    machine, pid = injector.watch.process(fault.rank)
    yield machine.name, _killed(machine, pid, f"rank {fault.rank}")


def _kill_driver(injector: Injector, fault: Fault) -> Story:
    machine, pid = injector.watch.driver()
    yield machine.name, _killed(machine, pid, "the driver")


def _kill_raylet(injector: Injector, fault: Fault) -> Story:
    host = injector.host(fault.rank)
    node = host.node_id
    host.kill(RAYLET)
    yield host.name, f"the raylet of node {node} got SIGKILL"


def _restart_head(injector: Injector, fault: Fault) -> Story:
    head = injector.hosts.head
    (gcs,) = head.kill(GCS)
    yield head.name, f"the GCS, process {gcs.pid}, got SIGKILL; the supervisor starts the head again"


def _power_off(injector: Injector, fault: Fault) -> Story:
    host = injector.host(fault.rank)
    host.power_off()
    _assert(not host.on, f"{host.name} has no power")
    yield host.name, f"{host.name} has no power"
    host.power_on()


def _cut(injector: Injector, fault: Fault) -> Story:
    host = injector.host(fault.rank)
    host.link(up=False)
    yield host.name, _unreachable(injector.hosts, host)
    host.link(up=True)


def _cut_store(injector: Injector, fault: Fault) -> Story:
    store = injector.hosts.store
    store.link(up=False)
    yield store.name, _unreachable(injector.hosts, store)
    store.link(up=True)


def _part(injector: Injector, fault: Fault) -> Story:
    hosts, sight = injector.hosts, injector.watch.look()
    mine = injector.host(fault.rank)
    others = {host for host, _ in sight.ranks.values()} - {mine.name} if sight else set()
    hosts.part([mine], [hosts.named(name) for name in sorted(others)])
    injector.watch.until(lambda _: hosts.dropped() > 0, "packets that are dropped among its ranks")
    yield mine.name, f"{hosts.dropped()} packets to and from {', '.join(sorted(others))} were dropped"
    hosts.join()


def _drain(injector: Injector, fault: Fault) -> Story:
    """As a cloud does it: a notice, and so many seconds later the machine is taken away."""
    host = injector.host(fault.rank)
    injector.hosts.drain(host, fault.seconds)
    yield host.name, f"Ray took the notice that {host.name} goes in {fault.seconds:g} s"
    host.power_off()


def _stop(injector: Injector, fault: Fault) -> Story:
    machine, pid = injector.watch.process(fault.rank)
    machine.signal("STOP", pid)
    _assert(machine.state(pid).startswith("T"), f"process {pid} is stopped")
    yield machine.name, f"process {pid} of rank {fault.rank} is stopped"
    if machine.state(pid):  # or somebody has killed it meanwhile
        machine.signal("CONT", pid)


def _fill_disk(injector: Injector, fault: Fault) -> Story:
    host = injector.host(fault.rank)
    host.run("sh", "-c", "cat /dev/zero > /tmp/full", check=False)  # until there is no room, whoever else writes meanwhile
    _assert(host.run("sh", "-c", "echo more > /tmp/more", check=False).returncode != 0, "/tmp is full")
    yield host.name, f"/tmp of {host.name} is full"
    host.run("rm", "/tmp/full", "/tmp/more")


KINDS: Mapping[str, FaultStory] = {
    "kill": _kill,
    "kill_raylet": _kill_raylet,
    "kill_driver": _kill_driver,
    "restart_head": _restart_head,
    "power_off": _power_off,
    "cut": _cut,
    "cut_store": _cut_store,
    "part": _part,
    "drain": _drain,
    "stop": _stop,
    "fill_disk": _fill_disk,
}
"""Name -> what does it: up to `yield (host, what shows that it happened)`, and after it what ends it again."""


def _killed(machine: Machine, pid: int, who: str) -> str:
    machine.signal("KILL", pid)
    for _ in range(50):
        if machine.state(pid)[:1] in ("", "Z"):
            return f"process {pid} of {who} is gone"
        time.sleep(0.1)
    raise MachineError(f"process {pid} of {who} on {machine.name} survives SIGKILL")


def _unreachable(hosts: Hosts, machine: VirtualMachine) -> str:
    carrier = hosts.sandbox("ip", "-o", "link", "show", machine.cable).stdout
    _assert("state DOWN" in carrier, f"the cable of {machine.name} is pulled")
    return f"the cable of {machine.name} is pulled"


def _assert(true: bool, what: str) -> None:
    if not true:
        raise MachineError(f"it did not happen that {what}")
