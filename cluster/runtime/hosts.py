"""Hosts made of Linux namespaces: a cluster of machines on this one, each with an address, processes, memory files and disk of its own.

    with Hosts(folder, workers=3) as hosts:          # a head that trains nothing, three workers, an S3 server, one virtual network
        hosts.wait(nodes=4)
        hosts.head.run("python", "jobs/train.py", f"run.store={hosts.url}/store", ...)
        hosts.workers[0].kill("raylet/raylet")

All of it lies in one sandbox (network, mount and process namespaces), which the kernel removes with every process, mount and address when
this process ends, SIGKILL included. The machines share the project's files, to read, and nothing else that is written: data, checkpoints
and runs go through S3. They are this machine's kernel, clock and cores, so nothing here measures speed.

Needs root or unprivileged user namespaces, and the Debian packages of `PACKAGES`. Open it in the main thread: Linux ends the sandbox with
the thread that started it.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parents[2]
PACKAGES = {"ip": "iproute2", "unshare": "util-linux", "pgrep": "procps", "nft": "nftables"}
"""Program -> the Debian package that has it."""

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
BRIDGE, STORE, HEAD, FIRST_WORKER = 1, 2, 10, 11
"""Last bytes of addresses."""

OBJECT_STORE_BYTES = 80_000_000
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A sandbox, and in it a machine, is a bash that says it is up and then sleeps. Signal CHLD is ignored so that the kernel takes the
# orphans of its process namespace away; bash keeps that through exec, dash does not. A machine knows no name server: none would answer,
# and gloo would wait 10 s for it at each start.
_UP = "trap '' CHLD; echo up; exec sleep infinity"
_SANDBOX = f"set -e; ip link set lo up; ip link add name br0 type bridge; ip addr add $1/24 dev br0; ip link set br0 up; {_UP}"
_DISK = """set -e; disk=$1; mkdir -p "$disk"; mount -t tmpfs -o size="$2" disk "$disk"; mkdir "$disk/home"; shift 2
for path; do mkdir -p "$disk/${path#/tmp/}"; mount --bind "$path" "$disk/${path#/tmp/}"; done"""
_MACHINE = f"""set -e; hostname "$1"; mount --bind "$2" /etc/hosts; mount --rbind "$3" /tmp
mount -t tmpfs -o size=1g shm /dev/shm; [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf; {_UP}"""
_CABLE = """set -e; ip link add name "$1" type veth peer name eth0 netns "$2"; ip link set "$1" master br0 up
exec nsenter -t "$2" -n sh -ec 'ip link set lo up; ip addr add "$0/24" dev eth0; ip link set eth0 up; ip route add default via "$1"' \\
    "$3" "$4" """
_FETCH = "import sys, urllib.request as r; sys.stdout.write(r.urlopen(sys.argv[1], timeout=5).read().decode())"
_FORWARD = "import sys; from cluster.runtime.hosts import _forward; _forward(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
_SERVED = "env | grep ^AWS_; echo; exec sleep infinity"


class HostsImpossible(RuntimeError):
    """This machine cannot make hosts of namespaces; the message says why and what to install or allow."""


class HostFault(RuntimeError):
    """What was asked of a host did not happen."""


class Process(NamedTuple):
    """A process as its own machine sees it."""

    pid: int
    command: str


def assert_possible() -> None:
    """Make sure that this machine can make hosts, by making the least of one.

    Raises:
        HostsImpossible: naming the packages that are missing, or what the kernel said.
    """
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)})
    if missing:
        raise HostsImpossible(f"hosts of namespaces need programs that are not here; run: apt-get install {' '.join(missing)}")
    probe = "ip link add name b type bridge; ip link add name v type veth peer name w; mount -t tmpfs t /dev/shm; unshare -nmuipf true"
    done = subprocess.run([*_unshare(), "sh", "-ec", probe], capture_output=True, text=True, env={"PATH": PATH}, check=False)
    if done.returncode:
        raise HostsImpossible(
            f"this machine's kernel forbids namespaces ({done.stderr.strip() or 'it gives no reason'}): be root with CAP_SYS_ADMIN "
            "(docker run --privileged), or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
        )


class Machine:
    """Where commands run. As it is, the machine this process is on.

    Attributes:
        name: its host name.
        environment: variables of everything that is run on it.
    """

    def __init__(self, name: str = platform.node(), environment: Mapping[str, str] = os.environ):
        self.name, self.environment = name, dict(environment)

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return True

    def run(self, *command: str | Path, check: bool = True, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder and return what it said.

        Raises:
            HostFault: if its exit code is not 0, unless `check` is off.
            subprocess.TimeoutExpired: after `seconds`.
        """
        return _run(self._enter(*command), self.environment, f"on {self.name}", check, seconds)

    def processes(self, pattern: str) -> list[Process]:
        """Its processes whose command line matches a regular expression."""
        lines = self.run("pgrep", "-af", pattern, check=False).stdout.splitlines()
        return [Process(int(pid), command) for pid, _, command in (line.partition(" ") for line in lines)]

    def signal(self, name: str, *pids: int) -> None:
        """Send a signal (KILL, STOP, CONT) to processes, by number.

        Raises:
            HostFault: if one is not there.
        """
        self.run("kill", f"-{name}", *map(str, pids))

    def state(self, pid: int) -> str:
        """What ps(1) says of a process (R, S, T stopped, Z), empty when it is gone."""
        return self.run("ps", "-o", "stat=", "-p", str(pid), check=False).stdout.strip()

    def fetch(self, url: str) -> str | None:
        """What a web server answers to this machine, None where nothing answers."""
        done = self.run(sys.executable, "-ISc", _FETCH, url, check=False, seconds=30)
        return None if done.returncode else done.stdout

    def _enter(self, *command: str | Path) -> list[str]:
        return ["env", "--chdir", str(PROJECT), *map(str, command)]


class VirtualMachine(Machine):
    """A machine of namespaces: its process 1 sleeps, and what runs on it is entered there.

    Attributes:
        ip: its address on the bridge.
        cable: its network interface on the bridge.
    """

    def __init__(self, hosts: "Hosts", name: str, ip: str, disk: str):
        super().__init__(name, hosts.environment)
        self.ip, self.cable = ip, f"v-{name}"
        self._hosts, self._disk = hosts, hosts.folder / name
        shared = [str(path) for path in dict.fromkeys((PROJECT, Path(sys.prefix))) if path.is_relative_to("/tmp")]
        hosts.sandbox("bash", "-c", _DISK, "disk", self._disk, disk, *shared)
        self.power_on()

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return self._process.poll() is None

    def popen(self, *command: str | Path, log: Path | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Start a command in the project's folder; unless `options` say otherwise, its output is appended to `<folder>/<name>.log`."""
        with open(log or self._hosts.folder / f"{self.name}.log", "a") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT} | options
            process = subprocess.Popen(self._enter(*command), env=self.environment, text=True, **streams)
        self._hosts.started.append(process)
        return process

    def kill(self, pattern: str, signal: str = "KILL") -> list[Process]:
        """Send a signal to all its processes whose command line matches.

        Raises:
            HostFault: if there is none.
        """
        found = self.processes(pattern)
        if not found:
            raise HostFault(f"no process of {self.name} matches {pattern!r}, so none got SIG{signal}")
        self.signal(signal, *(process.pid for process in found))
        return found

    def link(self, up: bool) -> None:
        """Plug its network cable in or pull it; the machine itself sees no more than a lost carrier."""
        self._hosts.sandbox("ip", "link", "set", self.cable, "up" if up else "down")

    def power_off(self) -> None:
        """Pull the plug: every process is gone at once, without a word to anybody; the disk stays."""
        os.kill(self._first, signal.SIGKILL)
        self._process.wait()

    def power_on(self) -> None:
        """Boot: an empty memory, the same disk, the same address."""
        boot = ("bash", "-c", _MACHINE, "machine", self.name, self._hosts.folder / "etc-hosts", self._disk)
        self._process, self._first = _boot([*self._hosts.inside, *_unshare("--uts", "--ipc", user=False), *map(str, boot)])
        self._hosts.started.append(self._process)
        number = re.findall(r"^NSpid:.*$", Path(f"/proc/{self._first}/status").read_text(), re.MULTILINE)[0].split()[-2]
        self._hosts.sandbox("bash", "-c", _CABLE, "cable", self.cable, number, self.ip, self._hosts.ip(BRIDGE))

    def _enter(self, *command: str | Path) -> list[str]:
        return [*_nsenter(self._first, "-u", "-i"), *super()._enter(*command)]


class Host(VirtualMachine):
    """A machine with Ray, under a supervisor that starts it again whenever it ends, as systemd's Restart=always would."""

    def __init__(self, *arguments: Any, ray: Sequence[str]):
        self._ray = [*ray, "--disable-usage-stats", "--block", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        super().__init__(*arguments)

    @property
    def node_id(self) -> str:
        """The hex id of its Ray node, a new one after each start.

        Raises:
            HostFault: if no raylet runs on it.
        """
        for process in self.processes(RAYLET):
            if found := re.search(r"--node_id=(\w+)", process.command):
                return found[1]
        raise HostFault(f"no raylet runs on {self.name}")

    def power_on(self) -> None:
        """Boot, and start Ray."""
        super().power_on()
        loop = 'ulimit -n 65536; until [ -e /tmp/given-up ]; do "$@"; echo "supervisor: ray ended with $?"; sleep 2; done'
        ray = ("ray", "start", f"--node-ip-address={self.ip}", *self._ray)
        self.popen("bash", "-c", loop, "supervisor", *ray)

    def give_up(self) -> None:
        """From now on a Ray that ends is not started again: the host is lost for good while its machine stays on."""
        self.run("touch", "/tmp/given-up")


class Hosts:
    """The cluster. Leaving the block ends everything on it.

    Attributes:
        folder: logs of the machines.
        head: keeps the cluster's state and offers no CPU.
        workers: `cpus` CPUs each, with the labels role=worker and host=<name>.
        store: the machine of the S3 server, which is no node of Ray's.
        url: the bucket on it, as the hosts know it.
        started: what was started on machines and not waited for.
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
        self.folder, self.url = folder.resolve(), f"s3://{BUCKET}"
        self.workers: list[Host] = []
        self.started: list[subprocess.Popen[str]] = []
        self._first_workers, self._cpus, self._disk = workers, cpus, disk
        self.environment = {
            "PATH": PATH,
            "HOME": "/tmp/home",
            "PYTHONPATH": str(PROJECT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "REACTDIFF_HOSTS": str(self.folder),  # by which any process of theirs is told from others
            **health,
            **(environment or {}),
        }

    def __enter__(self) -> "Hosts":
        assert_possible()
        assert threading.current_thread() is threading.main_thread(), "the sandbox would end with this thread"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "etc-hosts").write_text("127.0.0.1 localhost\n")
        boot = ["bash", "-c", _SANDBOX, "sandbox", self.ip(BRIDGE)]
        self._process, self._first = _boot(["setpriv", "--pdeathsig", "KILL", *_unshare(), *boot])
        self.inside = _nsenter(self._first)
        try:
            self._serve()
            self.head = self._host("head", HEAD, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0", "--labels=role=head")
            for _ in range(self._first_workers):
                self.add()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

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
            HostFault: after `seconds`.
        """
        end = time.monotonic() + seconds
        while (alive := sum(node["state"] == "ALIVE" for node in self.nodes())) != nodes:
            if time.monotonic() > end:
                raise HostFault(f"after {seconds:g} s Ray has {alive} nodes and not {nodes}; logs are in {self.folder}")
            time.sleep(0.5)

    def processes(self, pattern: str) -> list[tuple[Host, Process]]:
        """All processes of hosts that have power, by command line."""
        return [(host, process) for host in self.all if host.on for process in host.processes(pattern)]

    def drain(self, host: Host, seconds: float) -> None:
        """Give Ray the notice that a cloud gives: this host will be taken away in so many seconds. Nothing takes it away here.

        Raises:
            HostFault: if Ray does not accept it.
        """
        notice = "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=notice", f"--deadline-remaining-seconds={seconds:g}"
        self.head.run("ray", "drain-node", f"--address={self.head.ip}:6379", f"--node-id={host.node_id}", *notice)

    def part(self, some: Sequence[VirtualMachine], others: Sequence[VirtualMachine]) -> None:
        """Drop every packet between two groups of machines, both ways, until `join`; each still reaches all others."""
        one, two = (", ".join(machine.ip for machine in group) for group in (some, others))
        drops = (f"ip saddr {{ {a} }} ip daddr {{ {b} }} counter drop" for a, b in ((one, two), (two, one)))
        rules = "\n".join(("type filter hook forward priority 0;", *drops))
        self.sandbox("nft", f"table bridge parted {{\nchain forward {{\n{rules}\n}}\n}}")

    def dropped(self) -> int:
        """Packets that `part` has dropped so far."""
        rules = self.sandbox("nft", "list", "table", "bridge", "parted").stdout
        return sum(map(int, re.findall(r"counter packets (\d+)", rules)))

    def join(self) -> None:
        """End what `part` did."""
        self.sandbox("nft", "delete", "table", "bridge", "parted")

    def store_environment(self) -> dict[str, str]:
        """Variables that lead this process, which is no machine of the network, to the S3 server."""
        variables = {name: value for name, value in self.store.environment.items() if name.startswith("AWS_")}
        port = int(variables["AWS_ENDPOINT_URL"].rpartition(":")[2])
        return variables | {"AWS_ENDPOINT_URL": f"http://{self.forward(self.store, port)}"}

    def forward(self, machine: VirtualMachine, port: int) -> str:
        """An address (`127.0.0.1:port`) of this process that leads to a port of a machine, as `ssh -L` would."""
        with socket.create_server(("127.0.0.1", 0)) as here:
            number = here.fileno()
            machine.popen(sys.executable, "-c", _FORWARD, str(number), machine.ip, str(port), pass_fds=[number])
            return f"127.0.0.1:{here.getsockname()[1]}"

    def close(self) -> None:
        """End the sandbox and all that is in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first, signal.SIGKILL)
        for process in (self._process, *self.started):
            process.wait()
            if process.stdout:
                process.stdout.close()

    def sandbox(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command beside the machines, where the bridge is.

        Raises:
            HostFault: if its exit code is not 0.
        """
        return _run([*self.inside, *map(str, command)], {"PATH": PATH}, "beside the machines")

    def ip(self, last: int) -> str:
        """The address with this last byte."""
        return f"10.99.0.{last}"

    def _host(self, name: str, last: int, *ray: str) -> Host:
        return Host(self, name, self._known(name, last), self._disk, ray=ray)

    def _known(self, name: str, last: int) -> str:
        """The address of a new machine, once all know it by its name."""
        with open(self.folder / "etc-hosts", "a") as known:
            known.write(f"{self.ip(last)} {name}\n")
        return self.ip(last)

    def _serve(self) -> None:
        """Start the S3 server on a machine of its own, and tell every later machine where it is."""
        self.store = VirtualMachine(self, "store", self._known("store", STORE), "8g")
        serve = (sys.executable, PROJECT / "infra" / "objectstore.py", "/tmp/s3", "--bucket", BUCKET, "--address", self.store.ip)
        server = self.store.popen(*serve, "--", "sh", "-c", _SERVED, stdout=subprocess.PIPE)
        assert server.stdout is not None
        said = dict(line.rstrip("\n").split("=", 1) for line in iter(server.stdout.readline, "\n") if line)
        if not said:
            raise HostFault(f"the S3 server did not start; see {self.folder}/store.log")
        self.environment |= said
        self.store.environment |= said


def _unshare(*more: str, user: bool = True) -> list[str]:
    """The start of a command whose first process is number 1 of namespaces of its own, and takes all others along when it ends."""
    users = ["--user", "--map-root-user"] if user and os.geteuid() else []
    return ["unshare", *users, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *more]


def _nsenter(pid: int, *more: str) -> list[str]:
    """The start of a command that runs in the namespaces of a process."""
    users = ["-U", "--preserve-credentials"] if os.geteuid() else []
    return ["nsenter", "-t", str(pid), *users, "-n", "-m", "-p", *more, "--"]


def _run(
    command: Sequence[str], environment: Mapping[str, str], where: str, check: bool = True, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=seconds, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise HostFault(f"{where} `{shlex.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def _boot(command: Sequence[str]) -> "tuple[subprocess.Popen[str], int]":
    """Start namespaces and wait until their process 1 says that it is up; returns the command and that process, by its number here."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={"PATH": PATH})
        assert process.stdout is not None
        with process.stdout:
            if process.stdout.readline() != "up\n":
                process.kill()
                process.wait()
                errors.seek(0)
                raise HostFault(f"a machine did not boot: {errors.read().strip()}")
    first = process.pid
    while children := Path(f"/proc/{first}/task/{first}/children").read_text().split():
        first = int(children[0])
    return process, first


def _forward(number: int, ip: str, port: int) -> None:
    """Run on a machine: carry what comes in at an inherited listening socket, which is of the outer network, to a port of this one."""
    listening = socket.socket(fileno=number)
    while True:
        outer, _ = listening.accept()
        try:
            inner = socket.create_connection((ip, port), timeout=10)
        except OSError:
            outer.close()
            continue
        inner.settimeout(None)
        for source, sink in ((outer, inner), (inner, outer)):
            threading.Thread(target=_carry, args=(source, sink), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
