"""Small runs on hosts of namespaces: how they are started, disturbed and judged."""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.runtime.faults import Fault, Injected, Injector, Watch
from cluster.runtime.hosts import PROJECT, Hosts, HostsImpossible, assert_possible
from cluster.storage import open_store
from tests.tiny import OVERRIDES, job

SKIP = "REACTDIFF_SKIP_NAMESPACES"
TARGETS, BATCH = "/tmp/targets", 6  # a folder of each host's own disk
CONFIG = ["--config", str(PROJECT / "jobs/configs/demo.yaml")]

LONG = (
    *OVERRIDES,
    "optim.epochs={autoencoder: 60, diffusion: 6}",  # 400 steps of stage 1, about 15 s on two cores
    "run.checkpoint_every=240",
    "evaluation.baselines=false",
    "evaluation.clips=2",
)


@cache
def _reason() -> str:
    try:
        assert_possible()
    except HostsImpossible as error:
        return str(error)
    return ""


def requires_namespaces() -> None:
    """Fail where this machine cannot make hosts, or skip where that was asked for."""
    if not _reason():
        return
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"NOTHING OF SEVERAL HOSTS IS TESTED ({SKIP}=1): {_reason()}")
    pytest.fail(f"{_reason()}; {SKIP}=1 skips what needs them", pytrace=False)


class Run:
    """A run of `jobs/train.py` whose shards and store lie on the hosts' S3 server, one rank a host.

    Attributes:
        hosts: where it is.
        watch: looks at it.
        process: its driver's, or that of `ray job submit`.
    """

    def __init__(self, hosts: Hosts, name: str, ranks: int, *overrides: str):
        self.hosts, self.watch, self._injector = hosts, Watch(hosts.all, BATCH, TARGETS), None
        self._log = hosts.folder / f"run-{name}.log"
        self._folder = open_store(f"{hosts.url}/store/runs/{name}")
        places = (f"data.url={hosts.url}/shards", f"run.store={hosts.url}/store", f"telemetry.targets={TARGETS}")
        self._command = ("python", "jobs/train.py", *CONFIG, f"run.name={name}", f"workers.count={ranks}", *LONG, *places, *overrides)

    def start(self, submit: bool = False) -> "Run":
        """Give its command on the head, itself or by `ray job submit`."""
        head = self.hosts.head
        through = ("ray", "job", "submit", f"--address=http://{head.ip}:8265", "--") if submit else ()
        self.process: subprocess.Popen[str] = head.popen(*through, *self._command, log=self._log)
        return self

    def suffer(self, fault: Fault) -> Injected:
        """Let a fault happen to it."""
        return Injector(self.watch, self.hosts).inject(fault)

    def end(self, seconds: float = 600) -> str:
        """Look at it until its driver ends; its status.

        Raises:
            AssertionError: if it goes on for longer, or its driver fails, with what it said.
        """
        self.watch.spend(seconds, lambda: self.process.poll() is not None)
        assert self.process.poll() == 0, f"exit code {self.process.poll()}:\n{self.said()[-6000:]}"
        return json.loads(self._folder.read("state.json"))["status"]

    def said(self) -> str:
        """The driver's terminal."""
        return self._log.read_text()

    def weights(self) -> dict[str, str]:
        """Stage -> content hash of its exported weights."""
        exports = [json.loads(self._folder.read(entry.key)) for entry in self._folder.list("exports/") if entry.key.endswith(".json")]
        return {export["stage"]: export["hash"] for export in exports}

    def attempts(self, stage: str = "autoencoder") -> list[tuple[int, int]]:
        """The starts of the worker group that left rows of a stage: life and attempt."""
        folders = {entry.key.split("/")[1] for entry in self._folder.list("metrics/") if f"/{stage}-" in entry.key}
        return sorted((int(life), int(attempt)) for life, _, attempt in (folder.partition(".") for folder in folders))


@cache
def one_host_weights(shards: Path, ranks: int) -> dict[str, str]:
    """The weights of the same run with all ranks on this machine, in a store of files, without disturbance."""
    store = shards.parent / f"undisturbed-{ranks}"
    here = (f"data.url={shards}", f"run.store={store}", f"telemetry.targets={store}/targets")
    job("train", *CONFIG, "run.name=undisturbed", f"workers.count={ranks}", *LONG, *here)
    exports = (store / "runs/undisturbed/exports").rglob("*.json")
    return {export["stage"]: export["hash"] for export in (json.loads(path.read_text()) for path in exports)}


def leftovers(hosts: Hosts) -> list[str]:
    """What is still there of hosts that have ended: processes, mounts, network interfaces."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if str(hosts.folder) in line]
    links = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(("br0:", "v-"))]
    return [*_processes(hosts), *mounts, *links]


def _processes(hosts: Hosts) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # gone, or somebody else's
            continue
        if f"REACTDIFF_HOSTS={hosts.folder}".encode() in environment.split(b"\0") or str(hosts.folder).encode() in command:
            yield shlex.join(command.decode(errors="replace").split("\0"))
