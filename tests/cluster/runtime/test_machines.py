"""Machines of namespaces: each one of its own to whatever runs there, and nothing left of them afterwards."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from cluster.runtime import machines
from cluster.runtime.machines import PROJECT, MachineError, NamespacesForbidden, Network, VirtualMachine, assert_namespaces
from tests.cluster.support import multihost
from tests.cluster.support.multihost import SKIP, leftovers, requires_namespaces, soon

pytestmark = [pytest.mark.starts, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    requires_namespaces()
    with Network(tmp_path_factory.mktemp("machines"), {"GREETING": "hello"}) as network:
        yield network
    assert leftovers(network) == []


@pytest.fixture(scope="module")
def one(network: Network) -> VirtualMachine:
    return VirtualMachine(network, "one", 21, disk="16m")


@pytest.fixture(scope="module")
def two(network: Network, one: VirtualMachine) -> VirtualMachine:
    return VirtualMachine(network, "two", 22, disk="16m")


@pytest.fixture(scope="module")
def three(network: Network, two: VirtualMachine) -> VirtualMachine:
    return VirtualMachine(network, "three", 23, disk="16m")


def reaches(machine: VirtualMachine, other: VirtualMachine) -> bool:
    """Whether another machine answers, if only that nobody listens there."""
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 1), timeout=1)"
    said = machine.run(sys.executable, "-ISc", connect, other.name, check=False).stderr
    assert said.strip().endswith(("Connection refused", "timed out", "No route to host"))
    return "refused" in said


def test_a_machine_has_a_name_an_address_variables_and_processes_of_its_own(one: VirtualMachine, two: VirtualMachine) -> None:
    assert one.run("sh", "-c", "hostname; echo $GREETING").stdout.split() == ["one", "hello"]
    assert f" {one.ip}/24 " in one.run("ip", "-4", "address", "show", "eth0").stdout
    assert reaches(one, two) and reaches(two, one)
    sleeping = one.popen("sleep", "4321")
    assert soon(lambda: len(one.processes("sleep 4321")) == 1) and two.processes("sleep 4321") == []
    assert one.kill("sleep 4321") and sleeping.wait() != 0 and one.processes("sleep 4321") == []


def test_a_machine_that_joins_later_is_known_by_its_name(one: VirtualMachine, three: VirtualMachine) -> None:
    assert reaches(one, three)


def test_its_disk_is_its_own_and_outlives_a_loss_of_power_and_its_memory_does_not(one: VirtualMachine, two: VirtualMachine) -> None:
    one.run("sh", "-c", "touch /tmp/mine ~/mine /dev/shm/mine")
    look = ("sh", "-c", "ls -dU /tmp/mine ~/mine /dev/shm/mine 2> /dev/null; true")
    assert one.run(*look).stdout.split() == ["/tmp/mine", "/tmp/home/mine", "/dev/shm/mine"]
    assert two.run(*look).stdout == "" and not Path("/tmp/mine").exists() and not Path("/dev/shm/mine").exists()
    one.power_off()
    assert not one.on and not reaches(two, one)
    one.power_off()  # it has none already
    one.power_on()
    assert one.on and reaches(two, one)
    assert one.run(*look).stdout.split() == ["/tmp/mine", "/tmp/home/mine"]


def test_a_machine_whose_cable_is_pulled_reaches_nobody_until_it_is_plugged_in(
    one: VirtualMachine, two: VirtualMachine, three: VirtualMachine
) -> None:
    one.link(up=False)
    assert not reaches(one, two) and not reaches(two, one) and reaches(two, three)
    one.link(up=True)
    assert soon(lambda: reaches(one, two))


def test_parted_machines_reach_all_others_and_the_dropped_packets_are_counted(
    network: Network, one: VirtualMachine, two: VirtualMachine, three: VirtualMachine
) -> None:
    network.part([one], [two, three])
    assert network.dropped() == 0
    assert not reaches(one, two) and not reaches(three, one) and reaches(two, three)
    assert network.dropped() > 1
    network.join()
    assert reaches(one, two) and reaches(three, one)


def test_a_port_of_a_machine_is_reached_from_here(network: Network, one: VirtualMachine) -> None:
    one.popen(sys.executable, "-m", "http.server", "8080", "--directory", "/etc")
    assert soon(lambda: one.fetch("http://one:8080/hostname") is not None)
    with urlopen(f"http://{network.forward(one, 8080)}/hosts", timeout=10) as answer:
        told = answer.read().decode()
    assert told.startswith("127.0.0.1 localhost\n10.99.0.21 one\n"), "the file of the machine, not the one of this machine"


def test_what_did_not_happen_is_an_error(one: VirtualMachine) -> None:
    with pytest.raises(MachineError, match=r"no process of one matches 'never there', so none got SIGSTOP"):
        one.kill("never there", "STOP")
    with pytest.raises(MachineError, match=r"on one `.*sh -c 'echo oh; exit 3'` ended with 3:\noh"):
        one.run("sh", "-c", "echo oh; exit 3")


def test_nothing_outlives_the_process_that_made_them_even_if_it_is_killed(tmp_path: Path) -> None:
    owner = (
        "import sys, time; from pathlib import Path; from cluster.runtime.machines import Network, VirtualMachine\n"
        "with Network(Path(sys.argv[1]), {}) as network:\n"
        "    VirtualMachine(network, 'one', 21, disk='16m').popen('sleep', '600'); print('up', flush=True); time.sleep(600)"
    )
    requires_namespaces()
    command = [sys.executable, "-c", owner, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        made = Network(tmp_path, {})
        assert any("sleep 600" in command for command in leftovers(made))
        process.send_signal(signal.SIGKILL)
    assert soon(lambda: leftovers(made) == [])


def test_missing_programs_are_named_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "PATH", "/nowhere")
    with pytest.raises(NamespacesForbidden, match="apt-get install iproute2 nftables procps util-linux"):
        assert_namespaces()


def test_a_kernel_that_forbids_namespaces_is_told_from_one_that_lacks_programs() -> None:
    """A user namespace whose limit of network namespaces is 0 stands for a container without rights."""
    requires_namespaces()
    ask = "from cluster.runtime.machines import assert_namespaces; assert_namespaces()"
    forbid = f'echo 0 > /proc/sys/user/max_net_namespaces && exec {sys.executable} -c "{ask}"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 1
    assert "kernel forbids namespaces (unshare: unshare failed: No space left on device)" in done.stderr
    assert "sysctl kernel.unprivileged_userns_clone=1" in done.stderr


def test_where_they_are_impossible_the_tests_fail_unless_they_are_told_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multihost, "why_not", lambda: "the kernel forbids it")
    monkeypatch.delenv(SKIP, raising=False)
    with pytest.raises(pytest.fail.Exception, match="the kernel forbids it; REACTDIFF_SKIP_NAMESPACES=1 skips"):
        requires_namespaces()
    monkeypatch.setenv(SKIP, "1")
    with pytest.raises(pytest.skip.Exception, match="NOTHING OF SEVERAL HOSTS IS TESTED"):
        requires_namespaces()
