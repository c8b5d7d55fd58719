"""Machines made of Linux namespaces: each with an address, processes, shared memory and a disk of its own, on one virtual network.

All of them lie in one sandbox (network, mount and process namespaces), which the kernel removes with every process, mount and address
when this process ends, SIGKILL included. They share the files of the project, to read, and nothing that is written. They have this
machine's kernel, clock and cores, so nothing here measures speed.

Needs root or unprivileged user namespaces, and the Debian packages of `PACKAGES`.
"""

import contextlib
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

PROJECT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"ip": "iproute2", "unshare": "util-linux", "pgrep": "procps", "nft": "nftables"}
"""Program -> the Debian package that has it."""

BRIDGE = 1
"""Last byte of the address of the bridge."""

# A sandbox, and in it a machine, is a bash that says it is up and then sleeps. Signal CHLD is ignored so that the kernel takes the
# orphans of its process namespace away; bash keeps that through exec, dash does not. A machine knows no name server: none would answer,
# and gloo would wait 10 s for it at each start.
_UP = "trap '' CHLD; echo up; exec sleep infinity"
_SANDBOX = f"set -e; ip link set lo up; ip link add name br0 type bridge; ip addr add $1/24 dev br0; ip link set br0 up; {_UP}"
_DISK = """set -e; disk=$1; mkdir -p "$disk"; mount -t tmpfs -o size="$2" disk "$disk"; mkdir "$disk/home"; shift 2
for path; do mkdir -p "$disk/${path#/tmp/}"; mount --bind "$path" "$disk/${path#/tmp/}"; done"""
_MACHINE = f"""set -e; hostname "$1"; mount --bind "$2" /etc/hosts; mount --rbind "$3" /tmp
mount -t tmpfs -o size=1g shm /dev/shm; [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf; {_UP}"""
_CABLE = """set -e; ip link add name "$1" type veth peer name eth0 address "$5" netns "$2"; ip link set "$1" master br0 up
exec nsenter -t "$2" -n sh -ec 'ip link set lo up; ip addr add "$0/24" dev eth0; ip link set eth0 up; ip route add default via "$1"' \\
    "$3" "$4" """
_FETCH = "import sys, urllib.request as r; sys.stdout.write(r.urlopen(sys.argv[1], timeout=5).read().decode())"
_FORWARD = "import sys; from cluster.runtime.machines import _forward; _forward(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"


class NamespacesForbidden(RuntimeError):
    """This machine cannot make machines of namespaces; the message says why and what to install or allow."""


class MachineError(RuntimeError):
    """What was asked of a machine did not happen."""


class Process(NamedTuple):
    """A process as its own machine sees it."""

    pid: int
    command: str


def assert_namespaces() -> None:
    """Make sure that this machine can make others of namespaces, by making the least of one.

    Raises:
        NamespacesForbidden: naming the packages that are missing, or what the kernel said.
    """
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)})
    if missing:
        raise NamespacesForbidden(f"machines of namespaces need programs that are not here; run: apt-get install {' '.join(missing)}")
    probe = "ip link add name b type bridge; ip link add name v type veth peer name w; mount -t tmpfs t /dev/shm; unshare -nmuipf true"
    done = subprocess.run([*_unshare(), "sh", "-ec", probe], capture_output=True, text=True, env={"PATH": PATH}, check=False)
    if done.returncode:
        raise NamespacesForbidden(
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
            MachineError: if its exit code is not 0, unless `check` is off.
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
            MachineError: if one is not there.
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

    def __init__(self, network: "Network", name: str, last: int, disk: str):
        """Boot it.

        Args:
            network: that it is connected to.
            name: its host name.
            last: last byte of its address.
            disk: size of its /tmp, as mount(8) writes it; it takes memory as it fills.
        """
        super().__init__(name, network.environment)
        self.ip, self.cable, self._mac = address(last), f"v-{name}", f"02:00:00:00:00:{last:02x}"
        self._network, self._disk = network, network.folder / name
        with open(network.folder / "etc-hosts", "a") as known:
            known.write(f"{self.ip} {name}\n")
        shared = [str(path) for path in dict.fromkeys((PROJECT, Path(sys.prefix))) if path.is_relative_to("/tmp")]
        network.sandbox("bash", "-c", _DISK, "disk", self._disk, disk, *shared)
        self.power_on()

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return self._process.poll() is None

    def popen(self, *command: str | Path, log: Path | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Start a command in the project's folder; unless `options` say otherwise, its output is appended to `<folder>/<name>.log`."""
        with open(log or self._network.folder / f"{self.name}.log", "a") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output} | options
            process = subprocess.Popen(self._enter(*command), env=self.environment, text=True, **streams)
        self._network.started.append(process)
        return process

    def kill(self, pattern: str, signal: str = "KILL") -> list[Process]:
        """Send a signal to all its processes whose command line matches.

        Raises:
            MachineError: if there is none.
        """
        found = self.processes(pattern)
        if not found:
            raise MachineError(f"no process of {self.name} matches {pattern!r}, so none got SIG{signal}")
        self.signal(signal, *(process.pid for process in found))
        return found

    def link(self, up: bool) -> None:
        """Plug its network cable in or pull it; the machine itself sees no more than a lost carrier."""
        self._network.sandbox("ip", "link", "set", self.cable, "up" if up else "down")

    def power_off(self) -> None:
        """Pull the plug: every process is gone at once, without a word to anybody; the disk stays."""
        if self.on:
            os.kill(self._first, signal.SIGKILL)
            # The kernel takes its network away when it has time, and answers for it until then.
            with contextlib.suppress(MachineError):  # it had time
                self._network.sandbox("ip", "link", "delete", self.cable)
        self._process.wait()

    def power_on(self) -> None:
        """Boot: an empty memory, the same disk, the same addresses."""
        boot = ("bash", "-c", _MACHINE, "machine", self.name, self._network.folder / "etc-hosts", self._disk)
        self._process, self._first = _boot([*self._network.inside(), *_unshare("--uts", "--ipc", user=False), *map(str, boot)])
        self._network.started.append(self._process)
        number = re.findall(r"^NSpid:.*$", Path(f"/proc/{self._first}/status").read_text(), re.MULTILINE)[0].split()[-2]
        self._network.sandbox("bash", "-c", _CABLE, "cable", self.cable, number, self.ip, address(BRIDGE), self._mac)

    def _enter(self, *command: str | Path) -> list[str]:
        return [*_nsenter(self._first, "-u", "-i"), *super()._enter(*command)]


class Network:
    """A bridge, and machines that are connected to it. Leaving the block ends everything on them.

    Enter it in the main thread: Linux ends the sandbox with the thread that started it.

    Attributes:
        folder: logs of the machines.
        environment: variables of every machine that is added from now on.
        started: what was started on machines and not waited for.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        """Say what there shall be; nothing is made before the block is entered.

        Args:
            folder: an empty one of the caller's.
            environment: variables of all machines.
        """
        self.folder = folder.resolve()
        self.environment = {
            "REACTDIFF_MACHINES": str(self.folder),  # by which any process of theirs is told from others
            "PATH": PATH,
            "HOME": "/tmp/home",
            "PYTHONPATH": str(PROJECT),
            **environment,
        }
        self.started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        assert_namespaces()
        assert threading.current_thread() is threading.main_thread(), "the sandbox would end with this thread"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "etc-hosts").write_text("127.0.0.1 localhost\n")
        boot = ["bash", "-c", _SANDBOX, "sandbox", address(BRIDGE)]
        self._process, self._first = _boot(["setpriv", "--pdeathsig", "KILL", *_unshare(), *boot])
        try:
            self.fill()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def fill(self) -> None:
        """Add the machines there are at first; for classes of this one."""

    def sandbox(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command beside the machines, where the bridge is.

        Raises:
            MachineError: if its exit code is not 0.
        """
        return _run([*self.inside(), *map(str, command)], {"PATH": PATH}, "beside the machines")

    def inside(self) -> list[str]:
        """The start of a command that runs beside the machines."""
        return _nsenter(self._first)

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

    def forward(self, machine: VirtualMachine, port: int) -> str:
        """An address (`127.0.0.1:port`) of this process that leads to a port of a machine, as `ssh -L` would."""
        with socket.create_server(("127.0.0.1", 0)) as here:
            number = here.fileno()
            machine.popen(sys.executable, "-c", _FORWARD, str(number), machine.ip, str(port), pass_fds=[number])
            return f"127.0.0.1:{here.getsockname()[1]}"

    def close(self) -> None:
        """End the sandbox and all that is in it."""
        if self._process.poll() is None:
            os.kill(self._first, signal.SIGKILL)
        for process in (self._process, *self.started):
            process.wait()
            if process.stdout:
                process.stdout.close()


def address(last: int) -> str:
    """The address on the network with this last byte."""
    return f"10.99.0.{last}"


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
        raise MachineError(f"{where} `{shlex.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
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
                raise MachineError(f"a machine did not boot: {errors.read().strip()}")
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
