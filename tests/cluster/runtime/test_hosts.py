"""The cluster of hosts, but for Ray itself: the store, the supervisor, hosts that join. tests/cluster/multihost/ has Ray on it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime.hosts import RAYLET, SHIPPED, Hosts
from cluster.runtime.machines import PROJECT, MachineError
from cluster.storage import open_store
from tests.cluster.support.multihost import hosts_without_ray, leftovers, soon

pytestmark = [pytest.mark.starts, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_without_ray(tmp_path_factory.mktemp("hosts"), workers=1) as hosts:
        yield hosts
    assert leftovers(hosts) == []


def test_the_store_is_reached_over_the_network_by_hosts_and_from_here(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    put = "import sys; from cluster.storage import open_store; open_store(sys.argv[1]).put('key', b'from h1')"
    hosts.workers[0].run(sys.executable, "-c", put, f"{hosts.url}/x")
    for name, value in hosts.store_environment().items():
        monkeypatch.setenv(name, value)
    assert open_store(f"{hosts.url}/x").read("key") == b"from h1"


def test_the_supervisor_starts_ray_again_until_it_gives_up(hosts: Hosts) -> None:
    (host,) = hosts.workers
    assert soon(lambda: bool(host.processes(RAYLET)))
    first = host.node_id
    host.kill(RAYLET)
    assert soon(lambda: bool(host.processes(RAYLET))) and host.node_id != first
    host.give_up()
    host.kill(RAYLET)
    assert soon(lambda: not host.processes("supervisor"))
    with pytest.raises(MachineError, match="no raylet runs on h1"):
        print(host.node_id)


def test_a_host_that_is_added_has_the_next_name_and_joins(hosts: Hosts) -> None:
    late = hosts.add()
    assert hosts.workers[-1] is late and hosts.named("h2") is late
    assert soon(lambda: [host for host, _ in hosts.processes(RAYLET)] == [late])


def test_hosts_without_a_store_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.runtime.hosts.PROJECT", tmp_path)  # where there is no infra/objectstore.py
    hosts = hosts_without_ray(tmp_path)
    with pytest.raises(MachineError, match=r"the S3 server did not start; see .*store\.log"), hosts:
        pass
    assert leftovers(hosts) == []


def test_the_shipped_health_checks_are_those_of_the_cluster_on_aws() -> None:
    config = (PROJECT / "ray_config.yaml").read_text()
    assert dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", config)) == SHIPPED
