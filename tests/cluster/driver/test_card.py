"""Ranks and tasks compute where `workers.gpu` says, also on machines with a GPU; none of these has one, so whatever is sent there fails."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config.schema import Workers
from cluster.driver.ray_train import gang_of
from cluster.runtime.nodes import nodes
from cluster.runtime.placement import wait_for_place
from cluster.runtime.ray_cluster import connect
from cluster.runtime.tasks import map_tasks
from tests.cluster.support.machines import machines
from tests.tiny import ROOT, job, settings

PATH = f"{ROOT / 'tests/cluster/support/card'}:{ROOT}"
"""With it torch and Ray find a card."""

HIDING = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
"""Variables with which tests hide one."""


@pytest.mark.starts
def test_ranks_and_tasks_on_cpus_leave_a_card_alone_and_say_that_there_is_one(shards: Path, tmp_path: Path) -> None:
    seeing = {name: value for name, value in os.environ.items() if name not in HIDING} | {"PYTHONPATH": PATH}
    done = job("train", *settings(shards, tmp_path), "evaluation.baselines=false", env=seeing)
    assert "no GPU of this machine is used (workers.gpu): workers.gpu=true workers.count=1, or make train GPU=1" in done.stdout
    assert "FRCorr" in done.stdout and "CUDA" not in done.stdout + done.stderr


def where(_: None, number: int) -> tuple[str, str, int]:
    """What a task sees, and where it is."""
    import ray

    return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_node_id(), os.getpid()


def refuse(_: None, path: str) -> None:
    """Fails, and leaves the number of its process."""
    Path(path).write_text(str(os.getpid()))
    raise ValueError(path)


def placed() -> None:
    """Prints where tasks and ranks are placed with and without GPUs, and which processes of tasks are left."""
    connect()
    found: dict[str, Any] = {}
    with suppress(ValueError):
        list(map_tasks(refuse, [(str(folder := Path(os.environ["REFUSED"])),)], Workers(count=1, gpu=True)))
    found["refused"] = psutil.pid_exists(int(folder.read_text()))
    for gpu in (True, False):
        workers = Workers(count=1, gpu=gpu)
        tasks = [result for _, result in map_tasks(where, [(number,) for number in range(6)], workers)]
        left = [pid for *_, pid in tasks if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        found["gpu" if gpu else "cpu"] = [tasks, left, wait_for_place(gang_of(workers), 60, lambda *_: None)]
    found["cards"] = [node.id for node in nodes() if node.total.get("GPU")]
    print(json.dumps(found))


@pytest.mark.slow
def test_on_a_mixed_cluster_what_asks_for_a_gpu_gets_one_and_gives_it_back_and_nothing_else_sees_one(tmp_path: Path) -> None:
    with machines(1) as there:
        there.add(gpus=1)
        there.wait(2)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name not in HIDING}
        clean["REFUSED"] = str(tmp_path / "refused")
        environment = clean | {"PYTHONPATH": PATH, "RAY_ADDRESS": there.address, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-c", "from tests.cluster.driver.test_card import placed; placed()"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (card,) = found["cards"]
    assert not found["refused"], "who failed with a GPU is gone, too"
    tasks, left, ranks = found["gpu"]
    assert {(seen, node) for seen, node, _ in tasks} == {("0", card)} and ranks == [card]
    assert left == [], "whoever had a GPU is gone, and its memory with it"
    tasks, left, _ = found["cpu"]
    assert {seen for seen, *_ in tasks} == {""} and {node for _, node, _ in tasks} != {card}
    assert left, "processes without a GPU stay, for the next piece of work"
