"""The layout of ray_config.yaml on hosts: head, driver and ranks on machines of their own. The head goes, and training goes on."""

import json
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.runtime.hosts import GCS, Host, Hosts
from tests.cluster.data.test_stream_faults import copy
from tests.cluster.support.multihost import Run, leftovers, one_host_weights, requires_namespaces
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
LABELS = CONFIG["available_node_types"]["driver"]["labels"]
FETCH = """
import sys, urllib.request as r
sys.stdout.write(r.urlopen(r.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]}), timeout=5).read().decode())
"""


def settings(kind: str) -> dict[str, str]:
    """Ray's variables that ray_config.yaml gives the head, or a worker."""
    command = CONFIG[f"{kind}_start_ray_commands"][-1]
    return {name: value.replace("~", "/tmp/home") for name, value in re.findall(r"\b(RAY_(?!HEAD)\w+)=([^\s;]+)", command)}


class Shipped(Hosts):
    """Hosts with the variables, the token and the machine for drivers of ray_config.yaml."""

    def __init__(self, folder: Path):
        self._token = secrets.token_hex(32)
        super().__init__(folder, workers=2, health={}, environment={"RAY_AUTH_TOKEN": self._token})

    def __enter__(self) -> "Shipped":
        super().__enter__()
        labels = ",".join(f"{key}={value}" for key, value in LABELS.items())
        self.driver = self._host("driver", 30, f"--address={self.head.ip}:6379", "--num-cpus=0", f"--labels={labels}")
        self.workers.append(self.driver)
        return self

    def nodes(self) -> list[dict[str, Any]]:
        url = f"http://{self.head.ip}:8265/api/v0/nodes"
        done = self.head.run(sys.executable, "-ISc", FETCH, url, self._token, check=False) if self.head.on else None
        return json.loads(done.stdout)["data"]["result"]["result"] if done and not done.returncode else []

    def _host(self, name: str, last: int, *ray: str) -> Host:
        common = self.environment
        self.environment = common | settings("head" if name == "head" else "worker")
        try:
            return super()._host(name, last, *ray)
        finally:
            self.environment = common


class Submitted(Run):
    """A run that was given to the cluster as the README says, and goes on without whoever gave it."""

    def start(self, submit: bool = True) -> "Submitted":
        selector = f"--entrypoint-label-selector={json.dumps(LABELS)}"
        through = ("ray", "job", "submit", f"--address=http://{self.hosts.head.ip}:8265", "--submission-id=one", "--no-wait", selector)
        self.hosts.head.run(*through, "--", "python", "infra/supervise.py", "--", *self._command)
        return self

    def end(self, seconds: float = 600) -> str:
        self.watch.spend(seconds, lambda: self.status() not in ("", "RUNNING"))
        return self.status()

    def status(self) -> str:
        return json.loads(self._folder.read("state.json"))["status"] if self._folder.exists("state.json") else ""


@pytest.fixture
def shipped(tiny_shards: Path, tmp_path: Path) -> Iterator[Shipped]:
    requires_namespaces()
    with Shipped(tmp_path / "hosts") as hosts, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.store_environment().items():
            patch.setenv(name, value)
        copy(tiny_shards, f"{hosts.url}/shards")
        hosts.wait(nodes=4)
        yield hosts
    assert leftovers(hosts) == []


def test_a_head_that_is_switched_off_and_boots_again_does_not_stop_training(shipped: Shipped, tiny_shards: Path) -> None:
    run = Submitted(shipped, "head", 2).start()
    before = run.watch.until(lambda sight: sight.stage == "autoencoder" and sight.step >= 40, "40 steps")
    assert {host for host, _ in before.ranks.values()} == {"h1", "h2"}, "no rank lands beside the driver or on the head"
    assert shipped.driver.processes("jobs/train.py") and not shipped.head.processes("jobs/train.py")
    shipped.head.power_off()
    while_off = run.watch.until(lambda sight: sight.step >= before.step + 60, "60 more steps without a head")
    assert not shipped.head.on and while_off.ranks == before.ranks
    shipped.head.power_on()
    shipped.wait(nodes=4)
    assert run.end() == "DONE"
    assert run.attempts() == [(1, 0)], "no life and no worker group was started again"
    assert run.weights() == one_host_weights(tiny_shards, 2)
    assert shipped.head.processes(GCS)
    ray = ("ray", "job", "status", f"--address=http://{shipped.head.ip}:8265", "one")
    assert "succeeded" in shipped.head.run(*ray).stdout.lower(), "the head that came back knows the job"
