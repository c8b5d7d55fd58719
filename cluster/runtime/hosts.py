"""A Ray cluster of several hosts on this machine, with an S3 server beside it: what tests and proofs lose hosts of.

    with Hosts(folder, workers=3) as hosts:          # a head that trains nothing, three workers, an S3 server, one virtual network
        hosts.wait(nodes=4)
        hosts.head.run("python", "jobs/train.py", f"run.store={hosts.url}/store", ...)
        hosts.workers[0].kill(RAYLET)

The machines are those of `machines.py`. Data, checkpoints and runs go through S3, since nothing else is shared.
"""

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.runtime.machines import PROJECT, MachineError, Network, Process, VirtualMachine

FAST = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Health checks for tests: a host that is cut off is noticed in under 10 s; a raylet that stalls for 4 s is taken for dead."""

SHIPPED = {
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
"""Those of ray_config.yaml: noticed in under 35 s; a raylet may stall for 8 s."""

RAYLET, GCS = "raylet/raylet", "gcs/gcs_server"
"""Patterns of Ray's processes: one raylet on every machine, one GCS on the head."""

BUCKET = "hosts"
STORE, HEAD, FIRST_WORKER = 2, 10, 11
"""Last bytes of addresses."""

OBJECT_STORE_BYTES = 80_000_000
_SERVED = "env | grep ^AWS_; echo; exec sleep infinity"


class Host(VirtualMachine):
    """A machine with Ray, under a supervisor that starts it again whenever it ends, as systemd's Restart=always would."""

    def __init__(self, *arguments: Any, ray: Sequence[str]):
        self._ray = [*ray, "--disable-usage-stats", "--block", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        super().__init__(*arguments)

    @property
    def node_id(self) -> str:
        """The hex id of its Ray node, a new one after each start.

        Raises:
            MachineError: if no raylet runs on it.
        """
        for process in self.processes(RAYLET):
            if found := re.search(r"--node_id=(\w+)", process.command):
                return found[1]
        raise MachineError(f"no raylet runs on {self.name}")

    def power_on(self) -> None:
        """Boot, and start Ray."""
        super().power_on()
        loop = 'ulimit -n 65536; until [ -e /tmp/given-up ]; do "$@"; echo "supervisor: ray ended with $?"; sleep 2; done'
        ray = ("ray", "start", f"--node-ip-address={self.ip}", *self._ray)
        self.popen("bash", "-c", loop, "supervisor", *ray)

    def give_up(self) -> None:
        """From now on a Ray that ends is not started again: the host is lost for good while its machine stays on."""
        self.run("touch", "/tmp/given-up")


class Hosts(Network):
    """The cluster. Leaving the block ends everything on it.

    Attributes:
        head: keeps the cluster's state and offers no CPU.
        workers: `cpus` CPUs each, with the labels role=worker and host=<name>.
        store: the machine of the S3 server, which is no node of Ray's.
        url: the bucket on it, as the hosts know it.
    """

    def __init__(
        self,
        folder: Path,
        workers: int = 2,
        cpus: int = 1,
        health: Mapping[str, str] = FAST,
        environment: Mapping[str, str] | None = None,
        disk: str = "1g",
    ):
        """Say what there shall be; nothing is made before the block is entered.

        Args:
            folder: an empty one of the caller's.
            workers: hosts that train, at first.
            cpus: logical CPUs of each; a rank takes one, so 1 puts every rank on a host of its own.
            health: how soon the head takes a silent host for dead, FAST or SHIPPED.
            environment: more variables for all machines.
            disk: size of each machine's /tmp, as mount(8) writes it; it takes memory as it fills.
        """
        ray = {
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        super().__init__(folder, {**ray, **health, **(environment or {})})
        self.url = f"s3://{BUCKET}"
        self.workers: list[Host] = []
        self._first_workers, self._cpus, self._disk = workers, cpus, disk

    def fill(self) -> None:
        """Add store, head and workers."""
        self._serve()
        self.head = self._host("head", HEAD, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0", "--labels=role=head")
        for _ in range(self._first_workers):
            self.add()

    @property
    def all(self) -> list[Host]:
        """Head and workers."""
        return [self.head, *self.workers]

    def add(self) -> Host:
        """Boot one more worker, which joins the cluster by itself."""
        number = len(self.workers)
        name = f"h{number + 1}"
        join = f"--address={self.head.ip}:6379", f"--num-cpus={self._cpus}", f"--labels=role=worker,host={name}"
        self.workers.append(self._host(name, FIRST_WORKER + number, *join))
        return self.workers[-1]

    def named(self, name: str) -> Host:
        """The host of a name.

        Raises:
            KeyError: if there is none.
        """
        return {host.name: host for host in self.all}[name]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes Ray knows, dead ones too, as its state API has them; empty while the head does not answer."""
        answer = self.head.fetch(f"http://{self.head.ip}:8265/api/v0/nodes") if self.head.on else None
        return json.loads(answer)["data"]["result"]["result"] if answer else []

    def wait(self, nodes: int, seconds: float = 180) -> None:
        """Wait until exactly so many nodes live, the head among them.

        Raises:
            MachineError: after `seconds`.
        """
        end = time.monotonic() + seconds
        while (alive := sum(node["state"] == "ALIVE" for node in self.nodes())) != nodes:
            if time.monotonic() > end:
                raise MachineError(f"after {seconds:g} s Ray has {alive} nodes and not {nodes}; logs are in {self.folder}")
            time.sleep(0.5)

    def processes(self, pattern: str) -> list[tuple[Host, Process]]:
        """All processes of hosts that have power, by command line."""
        return [(host, process) for host in self.all if host.on for process in host.processes(pattern)]

    def drain(self, host: Host, seconds: float) -> None:
        """Give Ray the notice that a cloud gives: this host will be taken away in so many seconds. Nothing takes it away here.

        Raises:
            MachineError: if Ray does not accept it.
        """
        notice = "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=notice", f"--deadline-remaining-seconds={seconds:g}"
        self.head.run("ray", "drain-node", f"--address={self.head.ip}:6379", f"--node-id={host.node_id}", *notice)

    def store_environment(self) -> dict[str, str]:
        """Variables that lead this process, which is no machine of the network, to the S3 server."""
        variables = {name: value for name, value in self.store.environment.items() if name.startswith("AWS_")}
        port = int(variables["AWS_ENDPOINT_URL"].rpartition(":")[2])
        return variables | {"AWS_ENDPOINT_URL": f"http://{self.forward(self.store, port)}"}

    def _host(self, name: str, last: int, *ray: str) -> Host:
        return Host(self, name, last, self._disk, ray=ray)

    def _serve(self) -> None:
        """Start the S3 server on a machine of its own, and tell every later machine where it is."""
        self.store = VirtualMachine(self, "store", STORE, "8g")
        serve = (sys.executable, PROJECT / "infra" / "objectstore.py", "/tmp/s3", "--bucket", BUCKET, "--address", self.store.ip)
        server = self.store.popen(*serve, "--", "sh", "-c", _SERVED, stdout=subprocess.PIPE)
        assert server.stdout is not None
        lines = itertools.takewhile(lambda line: line != "\n", server.stdout)
        said = dict(line.rstrip("\n").split("=", 1) for line in lines)
        if not said:
            raise MachineError(f"the S3 server did not start; see {self.folder}/store.log")
        self.environment |= said
        self.store.environment |= said
