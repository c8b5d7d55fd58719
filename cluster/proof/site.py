"""Where the runs of a proof stand: on hosts of namespaces that this process makes, or on the cluster that RAY_ADDRESS names."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster.runtime.hosts import Host, Hosts
from cluster.runtime.machines import PROJECT, Machine, MachineError
from cluster.runtime.remote_machine import cluster_machines
from cluster.storage import Store, open_store

RANK_FAULTS = Path(__file__).parent / "rank_faults"
"""Folder of the module by which ranks do themselves what cannot be done to them."""

OF_ALL = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3600"}
OF_HEAD = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/home/ray-gcs"}
"""Of ray_config.yaml: a head that comes back knows its cluster, and the others wait for it."""


class Site(Protocol):
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
        self.environment |= OF_ALL | {"PYTHONPATH": f"{RANK_FAULTS}:{PROJECT}"}
        super().fill()
        self.driver = self._host("driver", 200, f"--address={self.head.ip}:6379", "--num-cpus=0", "--labels=pool=driver")

    def _host(self, name: str, last: int, *ray: str) -> Host:
        of_all = self.environment
        self.environment = of_all | (OF_HEAD if name == "head" else {})
        try:
            return super()._host(name, last, *ray)
        finally:
            self.environment = of_all


class HostsSite:
    """A site of hosts that this process has made."""

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


class ClusterSite:
    """A site on the cluster that RAY_ADDRESS names: the driver here, objects below a prefix of the user's store."""

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
def made_hosts(folder: Path, workers: int, cpus: int, dataset: Store) -> Iterator[HostsSite]:
    """Hosts of namespaces with a copy of a dataset in their S3 server, where this process finds it too, until the block ends.

    Raises:
        NamespacesForbidden: if this machine cannot make them.
    """
    with DrivenHosts(folder / "hosts", workers, cpus) as hosts, _variables(hosts.store_environment()):
        site = HostsSite(hosts, folder)
        copy = open_store(site.data)
        for entry in dataset.list():
            copy.put(entry.key, dataset.read(entry.key))
        hosts.wait(nodes=workers + 2)
        yield site


@contextmanager
def _variables(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= more
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
