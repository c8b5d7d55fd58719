"""A run's numbers through Ray's own metrics agents: a Prometheus that watches the cluster finds them wherever the driver is.

Each node of a Ray cluster has an agent that Prometheus scrapes, and Ray's head lists them all. What the driver sets there is `ray_` and
the metric's name, which infra/prometheus/ray.yml takes off again.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.metrics import Gauge

from cluster.runtime.nodes import is_private
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.repeating import repeating

log = logging.getLogger(__name__)

EVERY = 5.0
"""Seconds between two times that the agent is told."""

Series = tuple[str, tuple[tuple[str, str], ...]]


class RayMetrics:
    """Tells the agent of this node what an exporter serves; everything is a gauge there, which a rate does not mind."""

    def __init__(self, exporter: Exporter):
        self._exporter = exporter
        self._gauges: dict[str, Gauge] = {}
        self._told: set[Series] = set()

    def tell(self, over: bool = False) -> None:
        """Tell all that there is now; what is no more is 0 once, and not told again.

        Args:
            over: the run ends: then it is at no step.
        """
        now: dict[Series, float] = {}
        for metric in self._exporter.collect():
            for sample in metric.samples:
                if not (over and metric.name == "reactdiff_at"):
                    now[sample.name, tuple(sample.labels.items())] = float(sample.value)
        gone = dict.fromkeys(self._told - now.keys(), 0.0)
        self._told = set(now)
        for (name, labels), value in (now | gone).items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag_keys=tuple(key for key, _ in labels))
            self._gauges[name].set(value, dict(labels))


@contextmanager
def told_to_ray(exporter: Exporter) -> Iterator[None]:
    """Tell Ray's agent the numbers while the block runs, if there is a cluster that others may watch."""
    if not ray.is_initialized() or is_private():
        yield
        return
    metrics = RayMetrics(exporter)
    metrics.tell()
    try:
        with repeating(metrics.tell, EVERY, "ray metrics"):
            yield
    finally:
        metrics.tell(over=True)
