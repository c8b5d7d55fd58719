"""What it costs a rank to be counted: CPU time of steps with meter, reports and rows, in turns beside the same steps without."""

import pickle
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory

import torch

from cluster.runtime.device import peak_memory
from cluster.storage import open_store
from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.metrics_log import MetricsLog
from cluster.training.reporting import reporting
from cluster.training.requests import Request

PAIRS = 5
"""Measurements of each, in turns."""


def telemetry_overhead(stage: str, step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Share of a step's CPU time that is added by what a rank does to be counted, the median of five pairs.

    Args:
        stage: its name.
        step: an optimiser step.
        steps: of each measurement.
        device: where it computes.
    """
    shares = []
    for _ in range(PAIRS):
        without = _cpu_seconds(step, steps)
        with TemporaryDirectory() as folder:
            meter, log = Meter(0, 1, stage), MetricsLog(open_store(folder), 1, 0, stage)
            with reporting(meter, _sent, lambda: None):
                counted = _cpu_seconds(lambda: _counted(meter, log, step, device), steps)  # noqa: B023  # it is called before the next
        shares.append(counted / without - 1)
    return median(shares)


def _sent(snapshot: Snapshot) -> Request:
    """A report costs a rank to pickle it; who takes it is another process."""
    pickle.dumps(snapshot)
    return Request.NOTHING


def _counted(meter: Meter, log: MetricsLog, step: Callable[[], None], device: torch.device) -> None:
    """A step as the training loop counts it: as many phases, and a row."""
    for phase in ("data_wait", "backward", "agree", "optimizer", "agree", "optimizer"):
        with meter.phase(phase):
            pass
    with meter.phase("forward"):
        step()
    numbers = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-4}
    meter.gauges.update(progress_items=1.0, quarantined_items=0.0, **numbers)
    log.add(progress=1, step=1, **numbers, ledger=1)
    meter.gauges["peak_memory_bytes"] = peak_memory(device)
    meter.step_done(items=1, bytes=1, flops=1.0)


def _cpu_seconds(step: Callable[[], None], steps: int) -> float:
    """CPU seconds of all threads of this process."""
    began = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - began
