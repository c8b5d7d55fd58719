"""Several Ray nodes on this machine, one CPU each, that come and go; and a run on them, as its user sees it."""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import psutil
import ray
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from cluster.runs.checkpoint import newest_progress
from cluster.runtime.machines import Machine, MachineError
from cluster.runtime.run_watch import Watch
from cluster.runtime.scratch import PREFIX
from cluster.storage import open_store
from cluster.storage.folder import STAGED
from cluster.telemetry.metrics_log import read_rows
from tests.tiny import ROOT, settings

RAY = Path(sys.executable).with_name("ray")
STAGE = "autoencoder"
RUN = "REACTDIFF_TEST_RUN"
"""Variable of the environment of a run's driver, and of whatever that starts."""
HEAD_TYPE, NODE_TYPE = "ray.head.default", "one-cpu"
"""Types of an autoscaler's nodes."""
PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
"""Starts them, as an external one: the defaults of its own type are not in Ray's wheel."""
SIMPLE = {"launch_multiple": True, "disable_node_updaters": True}
"""Nodes that come at once, and on which nothing has to be installed."""
ALIVE = GcsNodeInfo.GcsNodeState.ALIVE
QUICK = {"initial_delay_ms": "1000", "period_ms": "1000", "timeout_ms": "1000", "failure_threshold": "3"}
"""Health checks by which a node that is gone is noticed in seconds."""
NOTHING_TO_DO = (
    *("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "cluster_synced_files"),
    *("head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter"),
)
"""What an autoscaler's configuration must say, and an external provider's has no default for."""

LIMIT = 800.0
"""Seconds after which a test gives up waiting; nothing is asserted of how long anything takes."""


class Machines:
    """The nodes, beside a head that trains nothing; each a `ray start --block` in a process group of its own.

    With an autoscaler, Ray's own, nodes of `NODE_TYPE` come when they are asked for: `most` at most.
    """

    def __init__(self, folder: Path, count: int, most: int, environment: Mapping[str, str]):
        usual = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "CUDA_VISIBLE_DEVICES"}
        clean = usual | environment  # each node is told how many GPUs it has
        self._environment = clean | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
        self._environment |= {f"RAY_health_check_{name}": value for name, value in QUICK.items()}
        with socket.socket() as free:
            free.bind(("", 0))
            self.address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        autoscaled = self._autoscaled(folder, most) if most else []
        port = self.address.rpartition(":")[2]
        self._head = self._start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", *autoscaled)
        while not _listens(self.address):
            assert self._head.poll() is None, "the head did not start"
            time.sleep(0.1)
        self._nodes = [self._add() for _ in range(count)]

    def _start(self, *options: str, blind: Path | None = None) -> subprocess.Popen[bytes]:
        """`ray start`, again until it comes up: on a busy machine the ports of two that start at once may collide.

        A blind one has a folder of its own where the others have this one.
        """
        common = ("--object-store-memory=80000000", "--dashboard-agent-listen-port=0", "--disable-usage-stats", "--block")
        command = shlex.join([str(RAY), "start", *options, *common])
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        loop = ["sh", "-c", f"until {command} || ! kill -0 $PPID; do sleep 1; done"]  # not for whoever was killed
        if blind:
            loop = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shlex.quote(str(blind))} && exec "$@"', "sh", *loop]
        return subprocess.Popen(loop, env=self._environment, start_new_session=True, **silent)

    def _autoscaled(self, folder: Path, most: int) -> list[str]:
        """Options of a head whose autoscaler starts processes of this machine for machines."""
        types = {HEAD_TYPE: ({"CPU": 0}, 0), NODE_TYPE: ({"CPU": 1, "object_store_memory": 80_000_000}, most)}
        config = {
            "cluster_name": "tests",
            "max_workers": most,
            "idle_timeout_minutes": 10,
            "provider": {"type": "external", "module": PROVIDER, "head_node_id": FAKE_HEAD_NODE_ID, "gcs_address": self.address} | SIMPLE,
            **{name: [] for name in NOTHING_TO_DO},
            "head_node_type": HEAD_TYPE,
            "available_node_types": {
                name: {"resources": has, "node_config": {}, "min_workers": 0, "max_workers": count} for name, (has, count) in types.items()
            },
        }
        (folder / "autoscaler.json").write_text(json.dumps(config))
        self._environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        self._environment |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
        return [f"--autoscaling-config={folder / 'autoscaler.json'}"]

    def _add(self, gpus: int = 0, labels: str = "", blind: Path | None = None) -> subprocess.Popen[bytes]:
        return self._start(f"--address={self.address}", "--num-cpus=1", f"--num-gpus={gpus}", f"--labels={labels}", blind=blind)

    def add(self, count: int = 1, gpus: int = 0, labels: str = "", blind: Path | None = None) -> None:
        self._nodes += [self._add(gpus, labels, blind) for _ in range(count)]

    def wait(self, count: int) -> None:
        """Until so many have joined."""
        while (joined := sum(node.state == ALIVE for node in GcsClient(self.address).get_all_node_info().values()) - 1) != count:
            assert all(node.poll() is None for node in self._nodes), f"{joined} of {count} nodes are there, and one does not come"
            time.sleep(0.2)

    def kill(self) -> None:
        """One goes away without a word, and does not come back."""
        _kill(self._nodes.pop())

    def kill_process(self, title: str) -> None:
        """The one process of that title, of a worker of Ray's, is gone without a word."""
        self.process(title).kill()

    def process(self, title: str) -> psutil.Process:
        """The one process of that title, of a worker of Ray's."""
        (one,) = self._processes(title)
        return one

    def _processes(self, title: str = "") -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                if one.environ().get("RAY_TMPDIR") == self._environment["RAY_TMPDIR"] and (not title or title in one.cmdline()):
                    found.append(one)
        return found

    def drain(self, node: str, seconds: int) -> None:
        """Tell the cluster that a node will be taken away, as a cloud does with a spot machine."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", str(seconds)]
        command = [RAY, "drain-node", "--address", self.address, "--node-id", node, *reason]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)

    def close(self) -> None:
        for process in (*self._nodes, self._head):
            _kill(process)
        for one in self._processes():  # what an autoscaler started
            with suppress(psutil.Error):
                one.kill()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as there:
        return there.connect_ex((host, int(port))) == 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def machines(count: int, most: int = 0, environment: Mapping[str, str] | None = None) -> Iterator[Machines]:
    """So many nodes of one CPU, without a token; or an autoscaler that starts so many at most. All of them with these variables, too."""
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path: Unix sockets allow 107 bytes
        there = Machines(Path(folder), count, most, environment or {})
        try:
            yield there
        finally:
            there.close()


started: list["Running"] = []
"""Runs of the test that runs now."""


def _abandoned(folder: Path, since: float) -> bool:
    """Whether a scratch folder is as new as that, and its process is gone."""
    with suppress(OSError):  # the folder is gone, too, or locked
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder.stat().st_mtime > since
        finally:
            os.close(lock)
    return False


class Running:
    """`jobs/train.py --stage autoencoder` in a process of its own, with what it says."""

    def __init__(self, shards: Path, store: Path, name: str, *more: str, address: str = "local"):
        self.folder = store / "runs" / name
        self.store = open_store(str(self.folder))
        self.lines: list[str] = []
        self._began = time.time()
        command = [sys.executable, str(ROOT / "jobs/train.py"), "--config", str(ROOT / "jobs/configs/demo.yaml"), "--stage", STAGE]
        # Every tenth step is a checkpoint's, and epochs are many: a fault finds the run in the middle.
        every = ("optim.epochs=24", "run.checkpoint_every=60", f"run.name={name}", f"telemetry.targets={store}/targets-{name}")
        self._watch = Watch(lambda: [Machine()], {STAGE: 6}, f"{store}/targets-{name}")
        self.process = subprocess.Popen(
            [*command, *settings(shards, store), *every, *more],
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}  # that of the tests' own Ray
            | {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1", RUN: str(self.folder)}
            | ({} if address == "local" else {"RAY_AUTH_MODE": "disabled"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        started.append(self)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    @property
    def progress(self) -> int:
        """Of the newest checkpoint."""
        return newest_progress(self.store, STAGE)

    @property
    def trained(self) -> int:
        """Items trained on in this life, as its driver tells; 0 while it tells nothing."""
        sight = self._watch.look()
        return sight.items if sight else 0

    @property
    def attempts(self) -> int:
        """Starts of a worker group that have kept rows."""
        return len({entry.key.split("/")[1] for entry in self.store.list("metrics/")})

    def until(self, what: Callable[[], object]) -> None:
        """Wait for something while the run goes on."""
        began = time.monotonic()
        while not what():
            if self.process.poll() is not None or time.monotonic() - began > LIMIT:
                self.kill()
                raise AssertionError(f"the run ended, or took too long, before that:\n{self.said}")
            time.sleep(0.05)

    def until_said(self, text: str, times: int = 1) -> None:
        self.until(lambda: sum(text in line for line in self.lines) >= times)

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank, which its driver tells."""
        return psutil.Process(self._watch.process(rank)[1])

    def trains(self, rank: int) -> bool:
        """Whether the process that the driver tells is there: just after a fault it is one that is gone."""
        with suppress(psutil.NoSuchProcess, MachineError):
            return self.rank(rank).is_running()
        return False

    def node_of(self, rank: int) -> str:
        """Ray's id of the node that holds a rank: the parent of the rank's process knows it."""
        raylet = self.rank(rank).parent()
        assert raylet is not None
        return next(word for word in raylet.cmdline() if word.startswith("--node_id=")).partition("=")[2]

    def end(self) -> int:
        """Its exit code, once it has ended."""
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run did not end:\n{self.said}") from None
        self.kill()
        for _ in range(300):
            if not (left := list(self._left_behind())):
                return self.process.returncode
            time.sleep(0.1)
        raise AssertionError(f"the run left behind: {left}")

    def _left_behind(self) -> Iterator[str]:
        """What is still there of a run that has ended: processes, ranks of a cluster's, shared memory, scratch folders, half objects."""
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):  # it is gone, or somebody else's
                if process.environ().get(RUN) == str(self.folder):
                    yield " ".join(process.info["cmdline"])
        below = psutil.Process().children(recursive=True)
        yield from (one.name() for one in below if one.is_running() and one.name().startswith(("ray::RayTrain", "ray::TrainController")))
        yield from (path.name for path in Path("/dev/shm").iterdir() if path.stat().st_mtime > self._began)
        if self.process.returncode >= 0:  # a driver that was killed leaves them to the next one
            scratch = [path for path in Path(gettempdir()).glob(f"{PREFIX}*") if _abandoned(path, self._began)]
            yield from (path.name for path in scratch)  # those of tests beside this one are locked
            yield from map(str, self.folder.rglob(f"{STAGED}*"))

    def kill(self) -> None:
        """Nothing of it is left."""
        self.process.kill()
        self._reader.join()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    @property
    def status(self) -> str:
        return json.loads(self.store.read("state.json"))["status"]

    @property
    def weights(self) -> str:
        """Content hash of its exported weights."""
        (export,) = self.folder.glob(f"exports/{STAGE}/*.json")
        return json.loads(export.read_text())["hash"]

    @property
    def ledger(self) -> list[float]:
        """Of every step, in order."""
        return [row["ledger"] for row in read_rows(self.store, STAGE)]


def stop_board(run: Running, there: Machines) -> None:
    """Stop the process through which driver and ranks of a run speak, once it trains, and wait until its driver says so."""
    run.until(lambda: run.progress >= 240)
    board = there.process("ray::Board")
    board.suspend()
    run.until_said("the process through which driver and ranks speak has not answered since")
    assert board.status() == psutil.STATUS_STOPPED
