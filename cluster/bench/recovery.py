"""How long training is away after a rank was killed: a run of ours, and a loop that does nothing under stock Ray Train, on the same Ray.

Both are measured from the SIGKILL of a rank to the end of the first optimiser step after it, by the clock of this machine. The rival
restores nothing, reads nothing and imports nothing but torch: what it takes is what Ray takes to start processes again.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.config.schema import Experiment
from cluster.driver.pin import pin
from cluster.driver.ray_train import gang_of, rank_environment, set_defaults
from cluster.driver.run import execute
from cluster.runtime.ray_cluster import connect
from cluster.storage import Store
from cluster.telemetry.display import Display
from cluster.telemetry.metrics_log import every_row

STAGE = "autoencoder"
STEPS_BEFORE = 2.0
"""Seconds that a group trains before one of its ranks is killed."""

POLL = 0.1
"""Seconds between two looks for the first step after a kill."""


class Killer(Thread):
    """Kills ranks of what this process runs, one after the other, each when the one before was got over.

    Attributes:
        killed: the time of each kill, in seconds of Unix time.
    """

    def __init__(self, kills: int, starts: Callable[[], list[float]], at_the_end: Callable[[], None]):
        super().__init__(name="killer", daemon=True)
        self.killed: list[float] = []
        self._kills, self._starts, self._at_the_end = kills, starts, at_the_end
        self.over = Event()

    def run(self) -> None:
        """Kill, wait for the first step after it, and so on."""
        try:
            self._kill()
        finally:
            if not self.over.is_set():  # or what is to be ended has ended, and its error is what counts
                self._at_the_end()

    def _kill(self) -> None:
        draw = random.Random(0)
        for number in range(self._kills + 1):
            while len(self._starts()) <= number:
                if self.over.wait(POLL):
                    return
            if number < self._kills:
                time.sleep(STEPS_BEFORE)
                victim = draw.choice(sorted(_ranks()))
                self.killed.append(time.time())
                os.kill(victim, signal.SIGKILL)


def _ranks() -> Iterator[int]:
    """The processes of this process's ranks."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in child.name():
                yield child.pid


@contextmanager
def _killing(kills: int, starts: Callable[[], list[float]], at_the_end: Callable[[], None]) -> Iterator[Killer]:
    killer = Killer(kills, starts, at_the_end)
    killer.start()
    try:
        yield killer
    finally:
        killer.over.set()
        killer.join()
        if len(killer.killed) < kills:
            raise RuntimeError(f"only {len(killer.killed)} of {kills} ranks were killed: what went before says why")


def our_recoveries(experiment: Experiment, kills: int, display: Display) -> list[float]:
    """Seconds from each kill to the end of the next step, of stage autoencoder of an experiment that takes long enough."""
    pinned = pin(experiment, "recovery")

    def starts() -> list[float]:
        return _first_steps(pinned.store)

    with _killing(kills, starts, lambda: os.kill(os.getpid(), signal.SIGINT)) as killer:
        try:
            execute(experiment, pinned, [STAGE], display)
        except KeyboardInterrupt:
            pass
        else:
            raise RuntimeError("the run came to its end before all kills: give it more epochs (optim.epochs)")
    return _between(killer.killed, starts())


def _first_steps(run: Store) -> list[float]:
    """The end of the first step of each start of the ranks, as far as a checkpoint has kept it."""
    first: dict[tuple[int, int], float] = {}
    for attempt, row in every_row(run, STAGE):
        first[attempt] = min(row["time"], first.get(attempt, row["time"]))
    return sorted(first.values())


def stock_recoveries(experiment: Experiment, kills: int, folder: Path) -> list[float]:
    """The same of a loop that does nothing, which Ray Train itself starts again."""
    connect(cpus=experiment.workers.least + 1)
    set_defaults()
    workers, folder = experiment.workers, folder / "stock"
    folder.mkdir(parents=True)
    trainer = TorchTrainer(
        _nothing,
        train_loop_config={"folder": str(folder)},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers.least, use_gpu=workers.gpu, resources_per_worker=dict(gang_of(workers).resources)),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="stock",
            storage_path=str(folder / "ray"),
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": rank_environment(workers)},
        ),
    )

    def starts() -> list[float]:
        return sorted(float(path.name) for path in (folder / "starts").glob("*"))

    with _killing(kills, starts, (folder / "end").touch) as killer:
        trainer.fit()
    return _between(killer.killed, starts())


def _nothing(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    number, end = torch.zeros(1), torch.zeros(1)
    dist.all_reduce(number)
    if rank == 0:
        (folder / "starts").mkdir(exist_ok=True)
        (folder / "starts" / f"{time.time():.3f}").touch()
    while not end.item():
        time.sleep(0.05)
        end.fill_((folder / "end").exists())
        dist.all_reduce(end)


def _between(killed: list[float], started: list[float]) -> list[float]:
    """Seconds from each kill to the first step after it."""
    return [min(start for start in started if start > kill) - kill for kill in killed]
