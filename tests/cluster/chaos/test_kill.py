"""Whatever is killed, and whenever: the same command brings the run to the weights of the undisturbed one, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.runs import checkpoint
from cluster.runs.state import newest_life
from cluster.storage import open_store
from tests.tiny import ROOT, call, job, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LONG = ("run.name=victim", "optim.epochs=12", "run.checkpoint_every=48", "evaluation.baselines=false", "evaluation.clips=2")
VICTIMS = ("worker", "driver")


def command(shards: Path, store: Path) -> list[str]:
    return ["--config", str(ROOT / "jobs/configs/demo.yaml"), *settings(shards, store), *LONG]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of each stage of a run nobody killed."""
    store = tmp_path_factory.mktemp("undisturbed")
    call("train", *command(shards, store))
    return weights(store)


def weights(store: Path) -> dict[str, str]:
    """Stage -> content hash of its exported weights."""
    exports = (store / "runs/victim/exports").rglob("*.json")
    return {path.parent.name: json.loads(path.read_text())["hash"] for path in exports}


def kill(victim: str, stage: str, shards: Path, store: Path) -> subprocess.Popen:
    """Start the run, wait for the stage's first checkpoint, and SIGKILL the victim while the stage goes on."""
    running = subprocess.Popen([sys.executable, str(ROOT / "jobs/train.py"), *command(shards, store)], stdout=subprocess.DEVNULL)
    folder = open_store(str(store / "runs/victim"))
    while not checkpoint.list_checkpoints(folder, stage):
        assert running.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    if victim == "driver":
        os.kill(running.pid, signal.SIGKILL)
    else:
        workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        os.kill(random.Random(stage).choice(workers).pid, signal.SIGKILL)
    assert stage not in weights(store), "the kill came before the stage's end"
    return running


def story(victim: str, stage: str, shards: Path, store: Path, undisturbed: dict[str, str]) -> None:
    running = kill(victim, stage, shards, store)
    code = running.wait()
    run = store / "runs/victim"
    if victim == "driver":
        assert code == -signal.SIGKILL and json.loads((run / "state.json").read_text())["status"] == "RUNNING"
        job("train", *command(shards, store))
        assert newest_life(open_store(str(run))) == 2
    else:
        assert code == 0
        assert list((run / "metrics").glob(f"*.1/{stage}-*")), "the worker group was started a second time"
    assert json.loads((run / "state.json").read_text())["status"] == "DONE"
    assert weights(store) == undisturbed


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_and_brought_back_the_weights_are_identical(
    victim: str, stage: str, shards: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    story(victim, stage, shards, tmp_path, undisturbed)


@pytest.mark.ci
def test_kill(shards: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """One case chosen by REACTDIFF_SEED, for a continuous integration that has no time for all."""
    chance = random.Random(int(os.environ.get("REACTDIFF_SEED", "0")))
    story(chance.choice(VICTIMS), chance.choice(["autoencoder", "diffusion"]), shards, tmp_path, undisturbed)
