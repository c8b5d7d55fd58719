"""Hosts of namespaces: each a machine of its own to whatever runs there, and nothing left of them afterwards."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.runtime import hosts as module
from cluster.runtime.hosts import PROJECT, RAYLET, SHIPPED, HostFault, Hosts, HostsImpossible, assert_possible
from cluster.storage import open_store
from tests.cluster.support import multihost
from tests.cluster.support.multihost import SKIP, leftovers, machines

pytestmark = [pytest.mark.starts, pytest.mark.timeout(120)]

REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with machines(tmp_path_factory.mktemp("machines")) as hosts:
        yield hosts
    assert leftovers(hosts) == []


@pytest.fixture
def health(hosts: Hosts) -> str:
    """A page of the S3 server."""
    return hosts.store.environment["AWS_ENDPOINT_URL"] + "/healthz"


def soon(condition: Callable[[], bool]) -> bool:
    """Whether something comes to be; how soon is nobody's promise."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_each_host_has_a_name_an_address_and_processes_of_its_own(hosts: Hosts) -> None:
    assert [host.run("hostname").stdout.strip() for host in hosts.all] == ["head", "h1", "h2"]
    one, two = hosts.workers
    with_one = one.popen("sleep", "4321")
    assert soon(lambda: len(one.processes("sleep 4321")) == 1) and two.processes("sleep 4321") == []
    assert one.kill("sleep 4321") and with_one.wait() != 0 and soon(lambda: one.processes("sleep 4321") == [])
    assert f" {one.ip}/24 " in one.run("ip", "-4", "address", "show", "eth0").stdout
    assert two.run(sys.executable, "-c", REACH, "h1", "1", check=False).stderr.strip().endswith("Connection refused")


def test_what_a_host_writes_to_tmp_stays_on_its_disk_and_what_it_shares_in_memory_is_gone_without_power(hosts: Hosts) -> None:
    one, two = hosts.workers
    one.run("sh", "-c", "touch /tmp/mine ~/mine /dev/shm/mine")
    looks = ("sh", "-c", "ls -dU /tmp/mine ~/mine /dev/shm/mine 2> /dev/null; true")
    assert one.run(*looks).stdout.split() == ["/tmp/mine", "/tmp/home/mine", "/dev/shm/mine"]
    assert two.run(*looks).stdout == "" and not Path("/tmp/mine").exists() and not Path("/dev/shm/mine").exists()
    one.power_off()
    assert not one.on
    one.power_on()
    assert one.run(*looks).stdout.split() == ["/tmp/mine", "/tmp/home/mine"]


def test_the_store_is_reached_over_the_network_by_hosts_and_from_here(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    put = "import sys; from cluster.storage import open_store; open_store(sys.argv[1]).put('key', b'from h1')"
    hosts.workers[0].run(sys.executable, "-c", put, f"{hosts.url}/x")
    for name, value in hosts.store_environment().items():
        monkeypatch.setenv(name, value)
    assert open_store(f"{hosts.url}/x").read("key") == b"from h1"


def test_a_host_whose_cable_is_pulled_reaches_nobody_until_it_is_plugged_in(hosts: Hosts, health: str) -> None:
    host = hosts.workers[0]
    assert host.fetch(health) is not None
    host.link(up=False)
    assert host.fetch(health) is None and hosts.workers[1].fetch(health) is not None
    host.link(up=True)
    assert soon(lambda: host.fetch(health) is not None)


def test_parted_hosts_reach_all_others_and_the_dropped_packets_are_counted(hosts: Hosts, health: str) -> None:
    one, two = hosts.workers
    hosts.part([one], [two])
    assert hosts.dropped() == 0
    assert one.run(sys.executable, "-c", REACH, "h2", "1", check=False).stderr.strip().endswith("timed out")
    assert hosts.dropped() > 0 and one.fetch(health) is not None and two.fetch(health) is not None
    hosts.join()
    assert one.run(sys.executable, "-c", REACH, "h2", "1", check=False).stderr.strip().endswith("Connection refused")


def test_the_supervisor_starts_ray_again_until_it_gives_up(hosts: Hosts) -> None:
    host = hosts.workers[1]
    assert soon(lambda: bool(host.processes(RAYLET)))
    first = host.node_id
    host.kill(RAYLET)
    assert soon(lambda: bool(host.processes(RAYLET))) and host.node_id != first
    host.give_up()
    host.kill(RAYLET)
    assert soon(lambda: not host.processes("supervisor"))
    with pytest.raises(HostFault, match="no raylet runs on h2"):
        print(host.node_id)


def test_a_signal_that_reaches_nobody_is_an_error(hosts: Hosts) -> None:
    with pytest.raises(HostFault, match=r"no process of h1 matches 'never there', so none got SIGSTOP"):
        hosts.workers[0].kill("never there", "STOP")


def test_a_host_that_joins_later_is_known_to_the_others(hosts: Hosts) -> None:
    late = hosts.add()
    assert hosts.workers[-1] is late and hosts.named("h3") is late
    assert hosts.head.run(sys.executable, "-c", REACH, "h3", "1", check=False).stderr.strip().endswith("Connection refused")


def test_nothing_outlives_the_process_that_made_the_hosts_even_if_it_is_killed(tmp_path: Path) -> None:
    owner = (
        "import sys, time; from pathlib import Path; from tests.cluster.support.multihost import machines\n"
        "with machines(Path(sys.argv[1])) as hosts:\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", owner, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        made = Hosts(tmp_path)
        assert len(leftovers(made)) > 5
        process.send_signal(signal.SIGKILL)
    assert soon(lambda: leftovers(made) == [])


def test_the_shipped_health_checks_are_those_of_the_cluster_on_aws() -> None:
    config = (PROJECT / "ray_config.yaml").read_text()
    assert dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", config)) == SHIPPED


def test_missing_programs_are_named_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATH", "/nowhere")
    with pytest.raises(HostsImpossible, match="apt-get install iproute2 nftables procps util-linux"):
        assert_possible()


def test_a_kernel_that_forbids_namespaces_is_told_from_one_that_lacks_programs() -> None:
    """A user namespace whose limit of network namespaces is 0 stands for a container without rights."""
    ask = "from cluster.runtime.hosts import assert_possible; assert_possible()"
    forbid = f'echo 0 > /proc/sys/user/max_net_namespaces && exec {sys.executable} -c "{ask}"'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "sh", "-c", forbid], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 1
    assert "kernel forbids namespaces (unshare: unshare failed: No space left on device)" in done.stderr
    assert "sysctl kernel.unprivileged_userns_clone=1" in done.stderr


def test_where_hosts_are_impossible_their_tests_fail_unless_they_are_told_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multihost, "_reason", lambda: "the kernel forbids it")
    monkeypatch.delenv(SKIP, raising=False)
    with pytest.raises(pytest.fail.Exception, match="the kernel forbids it; REACTDIFF_SKIP_NAMESPACES=1 skips"):
        multihost.requires_namespaces()
    monkeypatch.setenv(SKIP, "1")
    with pytest.raises(pytest.skip.Exception, match="NOTHING OF SEVERAL HOSTS IS TESTED"):
        multihost.requires_namespaces()
