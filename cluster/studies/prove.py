"""The proof that a run cannot be lost: it is run undisturbed, then under a script of faults, and both are compared.

Everything is done by commands on hosts, as a user would: nothing here is part of what is proven.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cluster.config.loading import load
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest, load_manifest
from cluster.driver.pin import stage_end
from cluster.runtime.failures import AGAIN
from cluster.runtime.faults import POLL, Fault, FaultStory, Injected, Injector, Sight, Story, Watch
from cluster.runtime.hosts import Host, Hosts
from cluster.runtime.machines import PROJECT, Machine, MachineError
from cluster.runtime.ray_cluster import connect
from cluster.runtime.remote_machine import cluster_machines
from cluster.storage import Store, open_store
from cluster.studies.script import STRIDE, kind_name, script, shrink, steps_of_script
from cluster.studies.verdict import Endured, Sameness, Trace, compare_traces, faults_table, read_trace
from cluster.telemetry.display import Display
from reactdiff.stage import stages_of

SPARE = 60.0
"""Seconds after which a host that is lost for good gets a spare."""

STALLED = 420.0
"""Seconds without anything new after which a run is taken for lost."""

NOTICED = 180.0
"""Seconds that a run is given to notice what it has to notice by itself, before the fault is lifted."""

REPEATS = 3
"""Times that the command is given again after one fault."""

CHECKPOINT = 20
"""Steps between the checkpoints of the runs that are compared."""

LARGEST = 4 << 30
"""Bytes of the largest dataset that is copied: the hosts' S3 server lies in memory."""

GRACE = 120.0
"""Seconds for a command that has to end by itself."""

OWN = ("damage_shards", "nan_gradient", "second_driver", "freeze_driver")
"""Faults beside those of `cluster/runtime/faults.py`: they need the run's data or its command."""

NAN = Path(__file__).parent / "nan_gradient"
"""Folder of the module by which ranks get a gradient of NaN."""

OF_ALL = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3600"}
OF_HEAD = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/home/ray-gcs"}
"""Of ray_config.yaml: a head that comes back knows its cluster, and the others wait for it."""


class NotInjected(RuntimeError):
    """A fault of a script never came, so the script says nothing of the run."""


class Ground(Protocol):
    """What runs stand on.

    Attributes:
        machines: all there are, spares too.
        hosts: those of namespaces, None on a user's cluster.
        data: URL of the dataset there.
        store: URL of a store of this run's own.
        targets: folder for its Prometheus target, on the driver's machine.
        logs: folder of the drivers' terminals.
    """

    machines: list[Machine]
    hosts: Hosts | None
    data: str
    store: str
    targets: str
    logs: Path

    def config(self, path: Path) -> str:
        """A configuration's file as drivers find it."""

    def popen(self, *command: str, log: Path) -> "subprocess.Popen[str]":
        """Start a command where drivers are."""

    def spare(self) -> str:
        """Add a host; returns its name."""


class DrivenHosts(Hosts):
    """Hosts laid out as ray_config.yaml has them: a head that keeps its state on its disk, and the driver on a machine of its own."""

    driver: Host

    def fill(self) -> None:
        """Add store, head, workers and the driver's machine."""
        self.environment |= OF_ALL | {"PYTHONPATH": f"{NAN}:{PROJECT}"}
        super().fill()
        self.driver = self._host("driver", 200, f"--address={self.head.ip}:6379", "--num-cpus=0", "--labels=pool=driver")

    def _host(self, name: str, last: int, *ray: str) -> Host:
        of_all = self.environment
        self.environment = of_all | (OF_HEAD if name == "head" else {})
        try:
            return super()._host(name, last, *ray)
        finally:
            self.environment = of_all


class HostsGround:
    """A ground of hosts that this process has made."""

    def __init__(self, hosts: DrivenHosts, folder: Path):
        self.hosts: Hosts | None = hosts
        self._made, self.logs = hosts, folder
        self.machines: list[Machine] = [hosts.driver, *hosts.all]
        self.data, self.store, self.targets = f"{hosts.url}/shards", f"{hosts.url}/store", "/tmp/targets"

    def config(self, path: Path) -> str:
        """A copy on the driver's machine, which has a /tmp of its own."""
        write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        self._made.driver.run(sys.executable, "-c", write, copy := f"/tmp/{path.name}", path.read_text())
        return copy

    def popen(self, *command: str, log: Path) -> "subprocess.Popen[str]":
        """Start a command on the driver's machine."""
        return self._made.driver.popen(*command, log=log)

    def spare(self) -> str:
        """Boot one more worker."""
        self.machines.append(host := self._made.add())
        return host.name


class ClusterGround:
    """A ground on the cluster that RAY_ADDRESS names: the driver here, objects below a prefix of the user's store."""

    hosts: Hosts | None = None

    def __init__(self, folder: Path, data: str, store: str):
        self.machines, self.logs, self.targets = cluster_machines(), folder, str(folder / "targets")
        self.data, self.store = data, store

    def config(self, path: Path) -> str:
        """The file itself."""
        return str(path)

    def popen(self, *command: str, log: Path) -> "subprocess.Popen[str]":
        """Start a command on this machine."""
        with open(log, "a") as output:
            words = [sys.executable if word == "python" else word for word in command]
            return subprocess.Popen(words, cwd=PROJECT, text=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def spare(self) -> str:
        """Never asked for: nothing is done here to a host.

        Raises:
            MachineError: always.
        """
        raise MachineError("a user's cluster gets no spare from this command")


@contextmanager
def made_hosts(folder: Path, workers: int, cpus: int, dataset: Store) -> Iterator[HostsGround]:
    """Hosts of namespaces with a copy of a dataset in their S3 server, where this process finds it too, until the block ends.

    Raises:
        NamespacesForbidden: if this machine cannot make them.
    """
    with DrivenHosts(folder / "hosts", workers, cpus) as hosts, _variables(hosts.store_environment()):
        ground = HostsGround(hosts, folder)
        copy = open_store(ground.data)
        for entry in dataset.list():
            copy.put(entry.key, dataset.read(entry.key))
        hosts.wait(nodes=workers + 2)
        yield ground


@contextmanager
def _variables(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= more
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@dataclass(frozen=True)
class Case:
    """A configuration whose runs are compared.

    Attributes:
        config: its file.
        overrides: of the user.
        experiment: what both make.
        dataset: where its data are.
        manifest: their state.
    """

    config: Path
    overrides: tuple[str, ...]
    experiment: Experiment
    dataset: Store
    manifest: Manifest

    @classmethod
    def read(cls, config: Path, overrides: Sequence[str], copied: bool) -> "Case":
        """The case of a file.

        Args:
            config: the file.
            overrides: of it.
            copied: whether its data will be copied to hosts of namespaces.

        Raises:
            ConfigError, ValueError: if it cannot be run, or its data are too many to be copied.
            NoDataset: if its data are not there.
        """
        experiment = anchored(load(config, overrides))
        dataset = open_store(experiment.data.url)
        manifest = load_manifest(dataset, experiment.data.manifest)
        if copied and (size := sum(entry.size for entry in dataset.list())) > LARGEST:
            raise ValueError(
                f"{dataset.url} holds {size / 1e9:.1f} GB, and the hosts' S3 server lies in memory: at most {LARGEST / 1e9:.1f} GB are "
                "copied. Prove it on a part of the data, or on simulated data (python jobs/prepare.py simulate)"
            )
        return cls(config.resolve(), tuple(overrides), experiment, dataset, manifest)

    @property
    def stages(self) -> tuple[str, ...]:
        """Of its runs."""
        return tuple(stages_of(self.experiment.model))

    @property
    def batches(self) -> dict[str, int]:
        """Stage -> items of a step."""
        return {stage: self.experiment.optim.batch[stage] for stage in self.stages}

    def steps(self) -> dict[str, int]:
        """Stage -> steps of the configuration as it is."""
        return {stage: math.ceil(stage_end(self.experiment, stage, self.manifest) / self.batches[stage]) for stage in self.stages}

    def shortened(self, steps: Mapping[str, int]) -> list[str]:
        """Overrides that make the stages so long, with frequent checkpoints and a row for each step."""
        items = 2 * int(self.manifest.counts(self.experiment.data.split).sum())
        epochs = {stage: (count * self.batches[stage] + 0.5) / items for stage, count in steps.items()}
        every = {stage: CHECKPOINT * self.batches[stage] for stage in steps}
        return [
            f"optim.epochs={_mapping(epochs)}",
            f"run.checkpoint_every={_mapping(every)}",
            "run.log_every=1",
            "data.on_corrupt=stop",
            "data.read_ahead=1",
            "data.cache=",
            "evaluation.clips=2",
            "evaluation.predictions=2",
            "evaluation.baselines=false",
            "evaluation.watch=0",
        ]

    def command(self, steps: Mapping[str, int], ground: Ground) -> list[str]:
        """What a driver is started with."""
        places = (f"data.url={ground.data}", f"run.store={ground.store}", f"telemetry.targets={ground.targets}", "telemetry.port=0")
        placement = ("workers.per_host=1", "workers.labels={}") if ground.hosts else ()
        command = ("python", "jobs/train.py", "--config", ground.config(self.config))
        return [*command, *self.overrides, "run.name=proof", *self.shortened(steps), *placement, *places]

    def run_folder(self, ground: Ground) -> Store:
        """Where its run is."""
        return open_store(f"{ground.store}/runs/proof")


def _mapping(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


class Course:
    """One run, from its first command to its end, under a script of faults.

    Attributes:
        endured: what it got over so far.
    """

    def __init__(self, case: Case, steps: Mapping[str, int], ground: Ground, name: str, display: Display):
        self.endured: list[Endured] = []
        self._case, self._steps, self._ground, self._display = case, steps, ground, display
        self._command, self._log = case.command(steps, ground), ground.logs / f"{name}.log"
        self._watch = Watch(lambda: ground.machines, case.batches, ground.targets)
        stories = (self._damage_shards, self._nan_gradient, self._second_driver, self._freeze_driver)
        own: dict[str, FaultStory] = dict(zip(OWN, stories, strict=True))
        self._injector = Injector(self._watch, ground.hosts, own)
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
        return read_trace(self._case.run_folder(self._ground), self._case.stages)

    def speed(self) -> float:
        """Steps a second of the fastest stage, as far as was seen."""
        speeds = [0.0]
        for stage in self._case.stages:
            sights = [sight for sight in self._watch.history if sight.stage == stage]
            if len(sights) > 1 and sights[-1].time > sights[0].time:
                speeds.append((sights[-1].step - sights[0].step) / (sights[-1].time - sights[0].time))
        return max(speeds)

    def said(self) -> str:
        """The last lines of the drivers' terminals."""
        return "\n".join(self._log.read_text().splitlines()[-15:])

    def _start(self) -> None:
        self._process = self._ground.popen(*self._command, log=self._log)
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
            over = self._open is None or self._watch.recovery(self._open).going < math.inf
            if sight and over and self._place(sight.stage, sight.step) >= due:
                return sight
            time.sleep(POLL)
        raise NotInjected(f"the run was at its end before {kind_name(fault)} came, due at step {fault.step} of stage {fault.stage}")

    def _look(self) -> bool:
        """Look at the run and at its driver, and do what is due; whether the run is at its end."""
        self._sight, now = self._watch.look(), self._watch.now()
        if sight := self._sight:
            self._tick_counter(self._place(sight.stage, sight.step), sum(self._steps.values()))
        if now >= self._spare_at:
            self._spare_at = math.inf
            self._display.say(f"{self._ground.spare()} joins as a spare")
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
        if fault.kind in ("damage_shards", "nan_gradient"):
            self._until_ended = True
            self._spend(lambda: not self._until_ended)
        elif fault.kind == "freeze_driver":
            self._how = "same command (while the first stood still)"
            self._spend(lambda: self._watch.history[-1].life > before.life)
            self._lift()
        elif fault.kind in ("power_off", "drain") or (fault.kind == "cut" and fault.seconds == math.inf):
            assert self._ground.hosts
            if (lost := self._ground.hosts.named(self._open.host)).on:
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
            over = self._watch.recovery(done)
            items = over.steps_lost * self._case.batches[done.before.stage]
            numbers = (over.noticed, over.going, items)
            self.endured.append(Endured(done.fault, done.host, done.before.step, done.detail, *numbers, self._how))
            self._open = None

    def _damage_shards(self, injector: Injector, fault: Fault) -> Story:
        """All bytes of all shards, of the dataset and of the latents, are others."""
        stores = [open_store(self._ground.data), open_store(self._ground.store)]
        whole = [(store, entry.key, store.read(entry.key)) for store in stores for entry in store.list() if entry.key.endswith(".tar")]
        for store, key, data in whole:
            store.put(key, data.translate(_INVERTED))
        store, key, data = whole[0]
        if store.read(key) == data:
            raise MachineError(f"it did not happen that {store.url}/{key} was damaged")
        yield "store", f"all bytes of {len(whole)} shards are inverted"
        for store, key, data in whole:
            store.put(key, data)

    def _nan_gradient(self, injector: Injector, fault: Fault) -> Story:
        host, (asked, happened) = injector.host(fault.rank), ("/tmp/nan-gradient", "/tmp/nan-gradient-happened")
        host.run("touch", asked)
        self._watch.spend(GRACE, lambda: host.run("test", "-e", happened, check=False).returncode == 0)
        if host.run("test", "-e", happened, check=False).returncode:
            raise MachineError(f"it did not happen that a gradient of rank {fault.rank} on {host.name} was NaN")
        yield host.name, f"the gradient of rank {fault.rank} is NaN"
        host.run("rm", "-f", asked, happened)

    def _second_driver(self, injector: Injector, fault: Fault) -> Story:
        machine, _ = self._watch.driver()
        second = self._ground.popen(*self._command, "--no-wait", log=self._log.with_suffix(".second.log"))
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


@dataclass(frozen=True)
class Proof:
    """What came of one try of a script.

    Attributes:
        endured: the faults that happened.
        sameness: of the two runs, None where the disturbed one did not come to its end.
        why: it did not.
    """

    endured: list[Endured]
    sameness: Sameness | None
    why: str = ""

    @property
    def proven(self) -> bool:
        """Whether the run got over all of it as promised."""
        return self.sameness is not None and self.sameness.proven

    def text(self) -> str:
        """The table and the verdict."""
        end = self.sameness.sentences if self.sameness else [f"the run was lost: {self.why}"]
        return "\n".join([faults_table(self.endured), "", *end, "PROVEN" if self.proven else "NOT PROVEN"])


class Prover:
    """Runs a case undisturbed and under scripts.

    Attributes:
        whole: what the undisturbed run left, once there was one.
    """

    def __init__(self, case: Case, folder: Path, display: Display, on_cluster: bool = False):
        """Run nothing yet.

        Args:
            case: what is run.
            folder: an empty one, for logs.
            display: shows progress.
            on_cluster: whether runs are on the cluster that RAY_ADDRESS names, and not on hosts of namespaces.
        """
        self._case, self._folder, self._display, self._on_cluster = case, folder, display, on_cluster
        self._runs = 0
        self._whole = Trace({}, {})

    def prove(self, seed: int, kinds: Sequence[str]) -> int:
        """Prove a seeded script, and say so; a script that fails is shortened.

        Returns:
            The exit code: 0 if it is proven.

        Raises:
            MachineError: if the undisturbed run does not end.
            NotInjected: if a fault did not come.
        """
        case, say = self._case, self._display.say
        self._steps = steps_of_script(kinds, case.stages)
        speed = self._undisturbed()
        longer = steps_of_script(kinds, case.stages, speed)
        if sum(longer.values()) - sum(self._steps.values()) > STRIDE:
            say(f"it makes {speed:.0f} steps a second, and goes on during some faults: once more, with longer stages")
            self._steps = longer
            self._undisturbed()
        faults = script(seed, kinds, self._steps, case.experiment.workers.most)
        say(f"script of seed {seed}: " + describe(faults))
        proof = self.attempt(faults)
        self._display.end(proof.text())
        if proof.proven or len(faults) == 1:
            return int(not proof.proven)
        say("looking for the shortest script that fails; each try is a run")
        left = shrink(faults, self._fails)
        say(f"the shortest script that fails: {describe(left)}")
        return 1

    def attempt(self, faults: Sequence[Fault]) -> Proof:
        """Run the case under a script on hosts of its own, and compare."""
        with self._ground() as ground:
            course = Course(self._case, self._steps, ground, "disturbed", self._display)
            try:
                trace = course.run(faults)
            except MachineError as error:
                return Proof(course.endured, None, str(error))
        workers = self._case.experiment.workers
        return Proof(course.endured, compare_traces(self._whole, trace, workers.least == workers.most))

    def _fails(self, faults: list[Fault]) -> bool:
        self._display.say(f"try {describe(faults)}")
        try:
            failed = not self.attempt(faults).proven
        except NotInjected as error:
            self._display.say(str(error))
            failed = False
        self._display.say("it fails" if failed else "it passes")
        return failed

    def _undisturbed(self) -> float:
        """Run it undisturbed; its steps a second."""
        was = ", ".join(f"{stage} {count} (the configuration has {self._case.steps()[stage]})" for stage, count in self._steps.items())
        self._display.say(f"undisturbed: steps of {was}; a checkpoint every {CHECKPOINT}, 2 clips are scored, one rank a host")
        with self._ground() as ground:
            course = Course(self._case, self._steps, ground, "undisturbed", self._display)
            self._whole = course.run([])
            return course.speed()

    @contextmanager
    def _ground(self) -> Iterator[Ground]:
        self._runs += 1
        folder, experiment = self._folder / str(self._runs), self._case.experiment
        if self._on_cluster:
            connect()
            folder.mkdir()
            yield ClusterGround(folder, experiment.data.url, f"{experiment.run.store}/{own_prefix(self._folder)}/{self._runs}")
            return
        workers = experiment.workers
        with made_hosts(folder, workers.most, math.ceil(workers.cpus), self._case.dataset) as ground:
            yield ground


def own_prefix(folder: Path) -> str:
    """Where the objects of a proof on a user's cluster lie, below `run.store`; named as the folder of its logs."""
    return f"proofs/{folder.name}"


def describe(faults: Sequence[Fault]) -> str:
    """A script in words."""
    return "; ".join(f"{kind_name(fault)} of rank {fault.rank} at {fault.stage} {fault.step}" for fault in faults)
