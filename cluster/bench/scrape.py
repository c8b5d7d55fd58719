"""What it costs a driver to be scraped."""

import time
from contextlib import closing
from statistics import median
from urllib.request import urlopen

from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter
from cluster.telemetry.metrics import METRICS
from reactdiff.config import STAGES

SCRAPES = 5
"""Of which the median counts."""


def scrape_seconds(ranks: int) -> float:
    """CPU seconds of this process to answer a Prometheus once, while so many ranks train."""
    with closing(Exporter("bench", 1)) as exporter:
        exporter.at(STAGES[1])
        for rank in range(ranks):
            meter = Meter(rank, ranks, STAGES[1])
            meter.gauges.update({metric.name: 1.0 for metric in METRICS if metric.source in ("rank 0", "every rank")})
            meter.step_done(items=1, bytes=1, flops=1.0)
            exporter.update(meter.snapshot())
        spent = []
        for _ in range(SCRAPES):
            began = time.process_time()
            with urlopen(f"http://127.0.0.1:{exporter.port}/metrics") as answer:
                answer.read()
            spent.append(time.process_time() - began)
        return median(spent)
