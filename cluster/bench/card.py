"""A device and what is to be trained on it: the engines, batches and timing of `jobs/bench.py gpu`.

It needs torch, DeepSpeed, NumPy, pydantic, PyYAML, rich and safetensors, and neither Ray nor object storage: whoever has a card for ten
minutes brings every figure back. On a CPU it measures the CPU.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from cluster.bench.training import engine_step, random_batch
from cluster.config.schema import Experiment
from cluster.training.ahead import Ahead
from cluster.training.engine import Engine
from cluster.training.settings import EngineSettings, engine_settings
from reactdiff.determinism import make_deterministic
from reactdiff.model.init import initial_weights
from reactdiff.stage import Source, Stage, build_without_memory, stages_over


@dataclass(frozen=True)
class Card:
    """What is measured on.

    Attributes:
        experiment: its configuration.
        source: what a dataset of clips would hold.
        device: where.
        steps: measured steps of each kind.
        planned: bytes of each (stage, precision, ZeRO stage) of `plan_engines`.
    """

    experiment: Experiment
    source: Source
    device: torch.device
    steps: int
    planned: Mapping[tuple[str, str, int], int] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[str, Stage]:
        """The stages."""
        return stages_over(self.source, self.experiment.model, self.experiment.diffusion)

    def items(self, stage: str) -> int:
        """Items of one step of one rank, as configured."""
        return self.experiment.workers.micro_batch or -(-self.experiment.optim.batch[stage] // self.experiment.workers.most)

    def settings(self, stage: str, **changes: Any) -> EngineSettings:
        """Of an engine of one rank, as configured but for changes."""
        return replace(engine_settings(self.experiment, stage, ranks=1), micro_batches=1, **changes)

    @contextmanager
    def engine(self, stage: str, **changes: Any) -> Iterator[Engine]:
        """An engine with these settings, which is ended; memory is counted anew from here on."""
        self.forget()
        settings = self.settings(stage, **changes)
        make_deterministic(self.experiment.workers.threads, tf32=settings.precision == "tf32")
        module = build_without_memory(self.kinds[stage])
        engine = Engine(module, initial_weights(module, self.experiment.seed), settings, self.device)
        try:
            yield engine
        finally:
            engine.end()

    def step(self, engine: Engine, stage: str, items: int) -> Callable[[], None]:
        """A step on a batch that is on the device already."""
        return engine_step(engine, random_batch(self.kinds[stage], items, self.device), items, 1)

    def fed_step(self, engine: Engine, stage: str, items: int) -> Callable[[], None]:
        """A step as in a run: on a batch that was copied from host memory beside the step before."""
        ahead, host = Ahead(self.device), random_batch(self.kinds[stage], items, torch.device("cpu"))
        if self.device.type == "cuda":
            host = {name: tensor.pin_memory() for name, tensor in host.items()}
        coming = SimpleNamespace(step=0, tensors=host)
        ahead.copy(coming)

        def step() -> None:
            nonlocal coming
            now, coming = coming, SimpleNamespace(step=coming.step + 1, tensors=host)
            tensors = ahead.take(now)
            ahead.copy(coming)
            engine_step(engine, tensors, items, 1)()
            ahead.drop(now)

        return step

    def seconds(self, work: Callable[[], Any], repeats: int = 0) -> float:
        """The median of some repeats, after two that warm up."""
        spent = []
        for _ in range(2 + (repeats or self.steps)):
            begin = time.perf_counter()
            work()
            self.wait()
            spent.append(time.perf_counter() - begin)
        return median(spent[2:])

    def wait(self) -> None:
        """Until the device has done what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Let go of what nobody refers to, and count memory anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
