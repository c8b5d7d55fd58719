import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import psutil
import pytest
import ray

from cluster import cli
from cluster.runtime import ray_cluster as placement
from cluster.storage import StorageError, open_store

BIN = Path(sys.executable).parent
JOB = """
from cluster.runtime.ray_cluster import connect
total = connect(cpus=4)
import ray

@ray.remote
def where():
    import reactdiff.clip
    return reactdiff.clip.__file__

print("JOB", ray.get_runtime_context().gcs_address, int(total.cpus), ray.get(where.remote()))
"""

PLACES = """
import ray
from ray.cluster_utils import Cluster
from cluster.runtime.ray_cluster import driver_risk

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=1, labels={"pool": "gpu", "market-type": "spot"})
cluster.add_node(num_cpus=1, labels={"pool": "driver"})
ray.init(cluster.address, logging_level="ERROR")
cluster.wait_for_nodes()
elsewhere = ray.remote(num_cpus=1)(driver_risk)
print("PLACE", driver_risk())
for pool in ("gpu", "driver"):
    print("PLACE", ray.get(elsewhere.options(label_selector={"pool": pool}).remote()))
"""


class Shell:
    """A fresh user on this machine: a HOME, a Ray folder and a project folder of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "project/jobs").mkdir(parents=True)
        (home / "project/jobs/x.py").write_text(JOB)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = clean | {"HOME": str(home), "RAY_TMPDIR": str(home), "PATH": f"{BIN}:{clean['PATH']}"}

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 120, **env: str) -> str:
        """Output of a command run in the project folder, or in another one."""
        options = {"cwd": cwd or self.home / "project", "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, env=self.env | env, timeout=timeout, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    @contextmanager
    def cluster(self) -> Iterator[tuple[int, int]]:
        """`ray start --head`; gives the ports of the cluster and of its dashboard."""
        port, dashboard = _free_ports()
        command = ["ray", "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}"]
        head = subprocess.Popen(command, env=self.env, start_new_session=True, text=True)
        try:
            assert head.wait(timeout=120) == 0
            yield port, dashboard
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # the cluster stays in the process group of `ray start`

    def submit(self, dashboard: int, *command: str, cwd: Path | None = None, timeout: float = 120) -> str:
        """`ray job submit --working-dir . -- COMMAND`; its output."""
        address = f"http://127.0.0.1:{dashboard}"
        return self.run("ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *command, cwd=cwd, timeout=timeout)

    def job_address(self, **env: str) -> str:
        """The cluster on which `python jobs/x.py` ran."""
        return _job_address(self.run("python", "jobs/x.py", **env))

    def token_files(self) -> list[Path]:
        return list(self.home.glob(".ray/*"))


def _job_address(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("JOB ")]
    assert len(lines) == 1, output
    return lines[0].split()[1]


@pytest.fixture
def shell() -> Iterator[Shell]:
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as home:  # a short path: Unix sockets allow 107 bytes
        yield Shell(Path(home))


def test_a_ray_that_does_not_start_on_a_busy_machine_is_said_so_and_the_same_command_may_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.setattr(placement.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(placement.ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")

    def main() -> int:
        placement.connect(cpus=1)
        return 0

    assert cli.run(main) == 75
    said = capsys.readouterr().err
    assert "(lost) RayNotStarted: Ray, which has 30 s for it, did not start on this machine" in said and "the machine is busy" in said


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def test_a_local_ray_has_the_cpus_asked_for_and_connecting_again_changes_nothing(local_ray: placement.Resources) -> None:
    assert local_ray.cpus >= 4
    assert local_ray.nodes == 1
    assert placement.connect(cpus=64) == local_ray == placement.resources()


def test_a_local_ray_listens_on_loopback_only(local_ray: placement.Resources) -> None:
    processes = psutil.Process().children(recursive=True)
    listening = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # some of Ray's live for a moment only
            listening |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert len(processes) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@pytest.mark.starts
def test_workers_of_a_local_ray_import_the_project_from_any_folder_and_leave_no_token_behind(shell: Shell) -> None:
    assert shell.job_address().startswith("127.0.0.1:")
    assert shell.token_files() == []


@pytest.mark.starts
def test_a_ray_address_where_nothing_answers_is_refused_with_the_way_out(shell: Shell) -> None:
    with pytest.raises(AssertionError, match=r"RAY_ADDRESS is 127\.0\.0\.1:1, but .*ray start --head.* RAY_ADDRESS=local"):
        shell.run("python", "jobs/x.py", RAY_ADDRESS="127.0.0.1:1")


@pytest.mark.slow
def test_ray_start_and_job_submit_work_after_and_beside_local_runs(shell: Shell, local_ray: placement.Resources) -> None:
    shell.job_address()
    with shell.cluster() as (port, dashboard):
        joined = shell.job_address()
        submitted = shell.submit(dashboard, "python", "jobs/x.py")
        alone = shell.job_address(RAY_ADDRESS="local")
    assert joined.endswith(f":{port}") and _job_address(submitted) == joined
    assert alone.startswith("127.0.0.1:") and not alone.endswith(f":{port}")
    assert shell.job_address().startswith("127.0.0.1:"), "a dead cluster, still noted by `ray start`, was not passed over"
    assert shell.token_files() == []
    assert ray.is_initialized()


def test_a_ray_of_one_machine_has_no_better_place_for_its_driver(local_ray: placement.Resources) -> None:
    assert placement.HEAD in ray.nodes()[0]["Resources"]
    assert placement.driver_risk() == ""


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("head", {"CPU": 8}, {}), ("other", {"CPU": 8}, {})], "this driver runs on the head of the cluster"),
        ([("head", {}, {})], "this driver runs on the head of the cluster"),
        ([("head", {}, {}), ("here", {}, {"pool": "driver"})], ""),
        ([("head", {}, {}), ("here", {"CPU": 8}, {"market-type": "spot"})], "this driver runs on a spot machine"),
        ([("head", {}, {}), ("here", {"CPU": 8}, {"ray.io/market-type": "spot"})], "this driver runs on a spot machine"),
        ([("head", {}, {}), ("here", {"CPU": 8}, {"market-type": "on-demand"})], ""),
    ],
)
def test_a_driver_on_the_head_or_on_a_spot_machine_is_said(
    nodes: list[tuple[str, dict[str, float], dict[str, str]]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [
        {"NodeID": name, "Alive": True, "Resources": resources | ({placement.HEAD: 1.0} if name == "head" else {}), "Labels": labels}
        for name, resources, labels in nodes
    ]
    driver = SimpleNamespace(get_node_id=lambda: "here" if nodes[-1][0] == "here" else "head")
    monkeypatch.setattr(ray, "nodes", lambda: [*seen, {"NodeID": "gone", "Alive": False}])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: driver)
    sentence = placement.driver_risk()
    assert sentence.startswith(said) and bool(sentence) == bool(said)
    assert not sentence or sentence.endswith("(README, 'A cluster')")


def test_only_nodes_that_take_work_must_see_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs needs no credentials of the bucket."""
    cpus = {"head": {}, "driver": {"CPU": 0.0}, "gpu": {"CPU": 8.0}}
    seen = [{"NodeID": name, "Alive": True, "Resources": has, "NodeManagerAddress": name} for name, has in cpus.items()]
    blind = SimpleNamespace(options=lambda scheduling_strategy: SimpleNamespace(remote=lambda store, key: False))
    monkeypatch.setattr(ray, "nodes", lambda: seen)
    monkeypatch.setattr(ray, "get", lambda found, timeout: found)
    monkeypatch.setattr(ray, "wait", lambda asked, num_returns, timeout: None)
    monkeypatch.setattr(placement, "draining_nodes", dict)
    monkeypatch.setattr(placement, "NodeAffinitySchedulingStrategy", lambda node, soft: node)
    monkeypatch.setattr(placement, "_has", blind)
    with pytest.raises(StorageError, match=r"1 of 1 nodes do not see what is written there \(gpu\)"):
        placement.assert_visible(open_store(str(tmp_path)), "run.store")


def test_what_an_autoscaler_cannot_give_is_said_once_and_all_else_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_events", lambda lines: iter(lines))
    monkeypatch.setattr(placement, "_told", set())
    cannot, adding = f"{placement.CANNOT} placement group requests (detail=1)", "Adding 1 node(s) of type gpu."
    said = [list(placement._what_is_new([cannot, adding])) for _ in range(2)]
    assert said == [[cannot, adding], [adding]]
    assert list(placement._what_is_new([cannot.replace("=1", "=2")])), "another request is another matter"


@pytest.mark.slow
def test_a_driver_on_the_head_or_on_a_spot_machine_of_a_real_cluster_is_said(shell: Shell) -> None:
    said = [line.removeprefix("PLACE").strip() for line in shell.run("python", "-c", PLACES).splitlines() if line.startswith("PLACE")]
    begins = ["this driver runs on the head of the cluster", "this driver runs on a spot machine", ""]
    assert [line.partition(":")[0] for line in said] == begins


def test_of_a_raylet_s_error_a_line_is_printed_and_of_a_worker_s_all(capsys: pytest.CaptureFixture[str]) -> None:
    error = "A worker died. " + "x" * 500 + "\n[state-dump] a page\n[state-dump] of it"
    placement._print_briefly({"lines": [error], "pid": "raylet", "is_err": False, "job": None}, ignore_prefix=False)
    placement._print_briefly({"lines": ["one", "two"], "pid": 7, "is_err": False, "job": None, "ip": "1.2.3.4"}, ignore_prefix=True)
    said = capsys.readouterr().out
    assert "A worker died. xxx" in said and "state-dump" not in said and len(said.splitlines()[0]) < 250
    assert said.splitlines()[-2:] == ["one", "two"]
