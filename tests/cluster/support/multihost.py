"""Small runs on hosts of namespaces: how they are started, disturbed and judged."""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from cluster.runs.state import newest_life
from cluster.runtime.faults import Fault, Injected, Injector
from cluster.runtime.hosts import Hosts
from cluster.runtime.machines import PATH, PROJECT, NamespacesForbidden, Network, assert_namespaces
from cluster.runtime.run_watch import Watch
from cluster.storage import open_store
from cluster.storage.s3 import S3Store
from tests.cluster.data.test_stream_faults import copy
from tests.tiny import OVERRIDES, job

SKIP = "REACTDIFF_SKIP_NAMESPACES"
BATCH = {"autoencoder": 6, "diffusion": 6}
TARGETS = "/tmp/targets"  # a folder of each host's own disk
CONFIG = ["--config", str(PROJECT / "jobs/configs/demo.yaml")]

LONG = (
    *OVERRIDES,
    "optim.epochs={autoencoder: 24, diffusion: 4}",  # 160 steps of stage 1
    "run.checkpoint_every=120",
    "evaluation.baselines=false",
    "evaluation.clips=2",
)


def soon(condition: Callable[[], bool]) -> bool:
    """Whether something comes to be; how soon is nobody's promise."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


@cache
def why_not() -> str:
    """Why this machine cannot make others of namespaces; empty where it can."""
    try:
        assert_namespaces()
    except NamespacesForbidden as error:
        return str(error)
    return ""


def requires_namespaces() -> None:
    """Fail where this machine cannot make hosts, or skip where that was asked for."""
    if not why_not():
        return
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"NOTHING OF SEVERAL HOSTS IS TESTED ({SKIP}=1): {why_not()}")
    pytest.fail(f"{why_not()}; {SKIP}=1 skips what needs them", pytrace=False)


class Run:
    """A run of `jobs/train.py` whose shards and store lie on the hosts' S3 server, one rank a host.

    Attributes:
        hosts: where it is.
        watch: looks at it.
        process: its driver's, or that of `ray job submit`.
    """

    def __init__(self, hosts: Hosts, name: str, ranks: int, *overrides: str):
        self.hosts, self.watch = hosts, Watch(lambda: hosts.all, BATCH, TARGETS)
        self._log = hosts.folder / f"run-{name}.log"
        folder = open_store(f"{hosts.url}/store/runs/{name}")
        assert isinstance(folder, S3Store)
        self._folder = folder
        places = (f"data.url={hosts.url}/shards", f"run.store={hosts.url}/store", f"telemetry.targets={TARGETS}")
        self._command = ("python", "jobs/train.py", *CONFIG, f"run.name={name}", f"workers.count={ranks}", *LONG, *places, *overrides)

    def start(self, submit: bool = False) -> "Run":
        """Give its command on the head, itself or by `ray job submit`."""
        head = self.hosts.head
        through = ("ray", "job", "submit", f"--address=http://{head.ip}:8265", "--working-dir=.", "--") if submit else ()
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
        client, where = self._folder.raw("x")
        prefix = where["Key"].removesuffix("x")
        assert not client.list_multipart_uploads(Bucket=where["Bucket"], Prefix=prefix).get("Uploads"), "half objects were left"
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

    def lives(self) -> int:
        """How often a driver of it was started."""
        return newest_life(self._folder)


@contextmanager
def cluster(folder: Path, shards: Path, workers: int) -> Iterator[Hosts]:
    """Hosts with one CPU each and these shards in their S3 server, where this process finds them too; nothing of them is left behind."""
    requires_namespaces()
    with Hosts(folder, workers) as hosts, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.store_environment().items():
            patch.setenv(name, value)
        copy(shards, f"{hosts.url}/shards")
        hosts.wait(nodes=workers + 1)
        yield hosts
    assert leftovers(hosts) == []


@cache
def one_host_weights(shards: Path, ranks: int, *overrides: str) -> dict[str, str]:
    """The weights of the same run with all ranks on this machine, in a store of files, without disturbance."""
    store = Path(mkdtemp(prefix="undisturbed-", dir=shards.parent))
    here = (f"data.url={shards}", f"run.store={store}", f"telemetry.targets={store}/targets")
    job("train", *CONFIG, "run.name=undisturbed", f"workers.count={ranks}", *LONG, *overrides, *here)
    exports = (store / "runs/undisturbed/exports").rglob("*.json")
    return {export["stage"]: export["hash"] for export in (json.loads(path.read_text()) for path in exports)}


def leftovers(network: Network) -> list[str]:
    """What is still there of machines that have ended: processes, mounts, network interfaces."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if str(network.folder) in line]
    links = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(("br0:", "v-"))]
    return [*_processes(network), *mounts, *links]


def _processes(network: Network) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # gone, or somebody else's
            continue
        if f"REACTDIFF_MACHINES={network.folder}".encode() in environment.split(b"\0") or str(network.folder).encode() in command:
            yield shlex.join(command.decode(errors="replace").split("\0"))


def hosts_without_ray(folder: Path, workers: int = 2) -> Hosts:
    """Hosts without Ray, which are up in a second."""
    requires_namespaces()
    without = PROJECT / "tests/cluster/support/without_ray"
    return Hosts(folder, workers, environment={"PATH": f"{without}:{PATH}"}, disk="64m")
