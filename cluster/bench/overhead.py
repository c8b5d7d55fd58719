"""What it costs a rank to be counted: CPU time of steps with meter, reports and rows, in turns beside the same steps without."""

import pickle
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory

import torch

from cluster.runtime.device import peak_memory
from cluster.storage import Store, open_store
from cluster.telemetry.meter import Meter
from cluster.telemetry.metrics_log import MetricsLog

PAIRS = 5
"""Measurements of each, in turns."""


def telemetry_overhead(stage: str, step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Share of a step's CPU time that is added by what a rank does to be counted, the median of five pairs.

    In a pair each step is taken twice, with and without, so that a machine that grows busier is so for both.

    Args:
        stage: its name.
        step: an optimiser step.
        steps: of each side of a pair.
        device: where it computes.
    """
    shares = []
    for _ in range(PAIRS):
        with TemporaryDirectory() as folder:
            counting = _Counting(stage, step, open_store(folder), device)
            spent = [(_cpu_seconds(counting.step), _cpu_seconds(step)) for _ in range(steps)]
        counted, without = map(sum, zip(*spent, strict=True))
        shares.append(counted / without - 1)
    return median(shares)


class _Counting:
    """What the training loop does to count a step: as many phases, a row, and once a second a report."""

    def __init__(self, stage: str, step: Callable[[], None], store: Store, device: torch.device):
        self._meter, self._log = Meter(0, 1, stage), MetricsLog(store, 1, 0, stage)
        self._step, self._device, self._told = step, device, time.monotonic()

    def step(self) -> None:
        """Take one, and count it."""
        for phase in ("data_wait", "backward", "agree", "optimizer", "agree", "optimizer"):
            with self._meter.phase(phase):
                pass
        with self._meter.phase("forward"):
            self._step()
        numbers = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-4}
        self._meter.gauges.update(progress_items=1.0, quarantined_items=0.0, **numbers)
        self._log.add(progress=1, step=1, **numbers, ledger=1)
        self._meter.gauges["peak_memory_bytes"] = peak_memory(self._device)
        self._meter.step_done(items=1, bytes=1, flops=1.0)
        if time.monotonic() - self._told > 1:
            pickle.dumps(self._meter.snapshot())  # who takes it is another process
            self._told = time.monotonic()


def _cpu_seconds(step: Callable[[], None]) -> float:
    """CPU seconds of all threads of this process."""
    began = time.process_time()
    step()
    return time.process_time() - began
