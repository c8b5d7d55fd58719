"""A run from its first command to its end, under a script of faults, and how it got over each of them."""

import math
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cluster.proof.comparison import Endured, Trace, read_trace
from cluster.proof.experiment import Case
from cluster.proof.script import FAULT_KINDS, kind_name, too_late
from cluster.proof.site import Site
from cluster.runtime.failures import AGAIN
from cluster.runtime.faults import Fault, FaultStory, Injected, Injector, Story, recovery
from cluster.runtime.machines import MachineError
from cluster.runtime.run_watch import POLL, Sight, Watch
from cluster.storage import open_store
from cluster.telemetry.display import Display

SPARE = 60.0
"""Seconds after which a host that is lost for good gets a spare."""

STALLED = 420.0
"""Seconds without anything new after which a run is taken for lost."""

NOTICED = 180.0
"""Seconds that a run is given to notice what it has to notice by itself, before the fault is lifted."""

REPEATS = 3
"""Times that the command is given again after one fault."""

GRACE = 120.0
"""Seconds for a command that has to end by itself."""

OWN = ("damage_shards", "nan_gradient", "out_of_memory", "second_driver", "freeze_driver")
"""Faults beside those of `cluster/runtime/faults.py`: they need the run's data, its command, or that its ranks play a part."""

STOPPING = ("damage_shards", "nan_gradient", "out_of_memory")
"""Those that stop the run by contract, and are lifted then."""


class NotInjected(RuntimeError):
    """A fault of a script never came, so the script says nothing of the run."""


class DisturbedRun:
    """One run, from its first command to its end, under a script of faults.

    Attributes:
        endured: what it got over so far.
    """

    def __init__(self, case: Case, steps: Mapping[str, int], site: Site, name: str, display: Display):
        self.endured: list[Endured] = []
        self._case, self._steps, self._site, self._display = case, steps, site, display
        self._command, self._log = case.command(steps, site), site.logs / f"{name}.log"
        self._watch = Watch(lambda: site.machines, case.batches, site.targets)
        stories = (self._damage_shards, self._by_rank, self._by_rank, self._second_driver, self._freeze_driver)
        own: dict[str, FaultStory] = dict(zip(OWN, stories, strict=True))
        self._injector = Injector(self._watch, site.hosts, own)
        self._open: Injected | None = None
        self._sight: Sight | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._until_ended = False
        self._how, self._repeats, self._spare_at = "", 0, math.inf
        self._tick_counter = display.counter(name, "steps")
        self._start()

    def run(self, faults: Sequence[Fault]) -> Trace:
        """Let the faults happen one after the other, and bring the run to its end; the command is given again where that is needed.

        Returns:
            What the run left.

        Raises:
            MachineError: if it does not come to its end.
            NotInjected: if it came there before a fault did.
        """
        try:
            for fault in faults:
                before = self._wait_for(fault)
                self._close()
                done = self._injector.do(replace(fault, rank=fault.rank % len(before.ranks)), before)
                self._display.say(f"{kind_name(fault)} after step {before.step} of stage {before.stage}: {done.detail}")
                self._open, self._how, self._repeats = done, "by itself", 0
                self._see_through()
            while not self._look():
                time.sleep(POLL)
            self._close()
        finally:
            for process in self._processes:
                if process.poll() is None:  # one that is stopped, too
                    process.kill()
        return read_trace(self._case.run_folder(self._site), self._case.stages)

    def said(self) -> str:
        """The last lines of the drivers' terminals."""
        return "\n".join(self._log.read_text().splitlines()[-15:])

    def _start(self) -> None:
        self._process = self._site.popen(*self._command, log=self._log)
        self._processes.append(self._process)
        self._started = self._watch.now()

    def _place(self, stage: str, step: int) -> int:
        """A step, counted over all stages."""
        stages = list(self._steps)
        return sum(self._steps[one] for one in stages[: stages.index(stage)]) + step

    def _wait_for(self, fault: Fault) -> Sight:
        """Wait until the fault's moment, and until the run has got over the fault before."""
        due = self._place(fault.stage, fault.step)
        while not self._look():
            sight = self._sight
            late = sight and too_late(self._steps, sight.stage, sight.step)
            if sight and sight.ranks and self._is_over() and self._place(sight.stage, sight.step) >= due and not late:
                return sight
            time.sleep(POLL)
        raise NotInjected(f"the run was at its end before {kind_name(fault)} came, due at step {fault.step} of stage {fault.stage}")

    def _is_over(self) -> bool:
        """Whether the run has got over the fault before, if there was one: it trains, and what had to be started again was."""
        if self._open is None:
            return True
        over = recovery(self._watch, self._open)
        noticed = over.noticed < math.inf or not FAULT_KINDS[kind_name(self._open.fault)].restarts
        return noticed and over.going < math.inf

    def _look(self) -> bool:
        """Look at the run and at its driver, and do what is due; whether the run is at its end."""
        self._sight, now = self._watch.look(), self._watch.now()
        if sight := self._sight:
            self._tick_counter(self._place(sight.stage, sight.step), sum(self._steps.values()))
        if now >= self._spare_at:
            self._spare_at = math.inf
            self._display.say(f"{self._site.spare()} joins as a spare")
        if (code := self._process.poll()) is not None:
            return code == 0 or self._again(code)
        known = [self._started, *(one.time for one in self._watch.history[-1:]), *([self._open.time] if self._open else [])]
        if now - max(known) > STALLED:
            raise MachineError(f"nothing was heard of the run for {STALLED:g} s; its driver runs and said last:\n{self.said()}")
        return False

    def _again(self, code: int) -> bool:
        """Give the same command again, after what had stopped it was lifted."""
        if self._open is None or self._repeats == REPEATS:
            times = f", {REPEATS} times" if self._repeats else ", and nothing had been done to it"
            raise MachineError(f"the driver ended with exit code {code}{times}:\n{self.said()}")
        if self._until_ended:
            self._lift()
        self._repeats += 1
        self._how = f"same command ({'killed' if code < 0 or code == 137 else f'exit code {code}'})"
        self._display.say(f"the driver ended with exit code {code}: the same command again")
        self._start()
        return False

    def _see_through(self) -> None:
        """Wait for what a fault that has no end of its own must bring about, and lift it; a host that is lost for good gets a spare."""
        assert self._open
        fault, before = self._open.fault, self._open.before
        if fault.kind in STOPPING:
            self._until_ended = True
            self._spend(lambda: not self._until_ended)
        elif fault.kind == "freeze_driver":
            self._how = "same command (while the first stood still)"
            self._spend(lambda: self._watch.history[-1].life > before.life)
            if self._watch.history[-1].life == before.life:
                raise MachineError(f"while the first driver stood still, no other trained in its stead for {NOTICED:g} s:\n{self.said()}")
            self._lift()
        elif fault.kind in ("power_off", "drain") or (fault.kind == "cut" and fault.seconds == math.inf):
            assert self._site.hosts
            if (lost := self._site.hosts.named(self._open.host)).on:
                lost.give_up()
            self._spare_at = self._watch.now() + SPARE
        if self._until_ended:
            self._lift()

    def _spend(self, ended: Callable[[], bool]) -> None:
        end = self._watch.now() + NOTICED
        while not ended() and self._watch.now() < end and not self._look():
            time.sleep(POLL)

    def _lift(self) -> None:
        assert self._open
        self._until_ended = False
        self._open = self._injector.lift(self._open)

    def _close(self) -> None:
        """Keep how the run got over the last fault."""
        if done := self._open:
            over = recovery(self._watch, done)
            items = over.steps_lost * self._case.batches[done.before.stage]
            numbers = (over.noticed, over.going, items)
            came = replace(done.fault, stage=done.before.stage)  # it may be later than the script has it
            self.endured.append(Endured(came, done.host, done.before.step, done.detail, *numbers, self._how))
            self._open = None

    def _damage_shards(self, injector: Injector, fault: Fault) -> Story:
        """All bytes of all shards, of the dataset and of the latents, are others."""
        stores = [open_store(self._site.data), open_store(self._site.store)]
        whole = [(store, entry.key, store.read(entry.key)) for store in stores for entry in store.list() if entry.key.endswith(".tar")]
        for store, key, data in whole:
            store.put(key, data.translate(_INVERTED))
        store, key, data = whole[0]
        if store.read(key) == data:
            raise MachineError(f"it did not happen that {store.url}/{key} was damaged")
        yield "store", f"all bytes of {len(whole)} shards are inverted"
        for store, key, data in whole:
            store.put(key, data)

    def _by_rank(self, injector: Injector, fault: Fault) -> Story:
        """What a rank does itself, as long as there is a file for it (`cluster/proof/rank_faults`)."""
        host, (asked, happened) = injector.host(fault.rank), (f"/tmp/rank-faults/{fault.kind}", f"/tmp/rank-faults-happened/{fault.kind}")
        host.run("sh", "-c", f"mkdir -p /tmp/rank-faults && touch {asked}")
        self._watch.spend(GRACE, lambda: host.run("test", "-e", happened, check=False).returncode == 0)
        what = {"nan_gradient": "has a gradient of NaN", "out_of_memory": "needs more memory than it gets"}[fault.kind]
        if host.run("test", "-e", happened, check=False).returncode:
            raise MachineError(f"it did not happen that rank {fault.rank} on {host.name} {what}")
        yield host.name, f"rank {fault.rank} {what}"
        host.run("rm", "-f", asked, happened)

    def _second_driver(self, injector: Injector, fault: Fault) -> Story:
        machine, _ = self._watch.driver()
        second = self._site.popen(*self._command, "--no-wait", log=self._log.with_suffix(".second.log"))
        self._assert_ends(second, "the second driver, with --no-wait,")
        yield machine.name, f"the same command with --no-wait ended with exit code {AGAIN}"

    def _freeze_driver(self, injector: Injector, fault: Fault) -> Story:
        machine, pid = self._watch.driver()
        frozen = self._process
        machine.signal("STOP", pid)
        if not machine.state(pid).startswith("T"):
            raise MachineError(f"it did not happen that driver {pid} was stopped")
        self._start()
        yield machine.name, f"driver {pid} is stopped, and the same command was given again"
        machine.signal("CONT", pid)
        frozen.send_signal(signal.SIGCONT)  # nsenter stops with its child, and does not go on with it
        self._assert_ends(frozen, "the driver that came back")

    def _assert_ends(self, process: "subprocess.Popen[str]", what: str) -> None:
        self._watch.spend(GRACE, lambda: process.poll() is not None)
        if (code := process.poll()) != AGAIN:
            process.kill()
            raise MachineError(f"{what} had to end with exit code {AGAIN}, but {'runs on' if code is None else f'ended with {code}'}")


_INVERTED = bytes(255 - value for value in range(256))
