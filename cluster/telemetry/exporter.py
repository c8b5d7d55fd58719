"""What Prometheus sees of a run: one endpoint beside the driver, fed with the meters' snapshots.

Labels are run, life, trial and stage, and the rank on what is a rank's own; counters and histograms are sums over
ranks, so a thousand ranks cost a scrape no more of them than one does. `docs/telemetry.md` lists the metrics.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app, start_http_server

from cluster.telemetry.meter import BUCKETS, COUNTERS, GAUGES, Snapshot, Tally, Totals

POLL = 0.1
"""Seconds between two looks of `drain`."""

Sample = tuple[dict[str, str], float]


class Exporter:
    """Serves `/metrics` for one life of a run; within a life no counter falls, whatever happens to the ranks.

    Attributes:
        tally: the sums it serves.
        port: the port it listens on, chosen by the system when 0 was asked for.

    Raises:
        ValueError: if the address cannot be listened on.
    """

    def __init__(
        self, run: str, life: int, trial: str = "", host: str = "127.0.0.1", port: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self.tally = Tally(clock)
        self._labels = {"run": run, "life": str(life), "trial": trial}
        self._lock = threading.Lock()
        self._restarts: Counter[str] = Counter()
        self._version, self._scraped = 0, -1
        self._target: tuple[Path, str] | None = None
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ValueError(
                f"telemetry.port is {port}, but {host} cannot listen on it ({error.strerror}); choose a free port, or 0 for any"
            ) from error
        registry.register(self)
        self._server.set_app(self._noting_scrapes(make_wsgi_app(registry)))
        self.port: int = self._server.server_port
        self._address = f"{host}:{self.port}"

    def update(self, snapshot: Snapshot) -> None:
        """Take a rank's latest snapshot."""
        with self._lock:
            self.tally.update(snapshot)
            self._version += 1

    def restarts(self, kind: str) -> None:
        """Count a restart of the worker group, by its failure class."""
        with self._lock:
            self._restarts[kind] += 1
            self._version += 1

    def write_target(self, folder: str | Path) -> None:
        """Let a Prometheus find this exporter: it watches `<folder>/*.json` (file_sd). `close` takes the file back.

        A run (or trial) has one file, so a life replaces the file of one that died without closing.
        """
        name = "+".join(filter(None, (self._labels["run"], self._labels["trial"])))
        path = Path(folder) / f"{name}.json"
        text = json.dumps([{"targets": [self._address], "labels": self._labels}])
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.{self._labels['life']}")  # a name that *.json does not match
        half.write_text(text)
        os.replace(half, path)
        self._target = (path, text)

    def drain(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Wait up to so many seconds until the latest numbers have been scraped, but not if nobody ever scraped.

        Returns:
            whether the latest numbers were scraped.
        """
        for _ in range(ceil(seconds / POLL)):
            if self._scraped in (-1, self._version):
                break
            sleep(POLL)
        return self._scraped == self._version

    def close(self) -> None:
        """Stop serving, and take back the target file unless a newer life has replaced it."""
        if self._target:
            path, text = self._target
            if path.exists() and path.read_text() == text:
                path.unlink()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """The run's metrics, as prometheus_client asks for them at each scrape."""
        with self._lock:
            stages, gauges, ranks = self.tally.stages(), self.tally.gauges(), self.tally.ranks()
            restarts = [({"class": kind}, count) for kind, count in self._restarts.items()]
        for key, counter in COUNTERS.items():
            yield self._metric("counter", *counter[:2], [({"stage": stage}, totals[key]) for stage, totals in stages.items()])
        for gauge in GAUGES:
            name = gauge.name
            if gauge.per_rank:
                values = [({"stage": r["stage"], "rank": str(r["rank"])}, r["gauges"][name]) for r in ranks if name in r["gauges"]]
            else:
                values = [({"stage": stage}, latest[name]) for stage, latest in gauges.items() if name in latest]
            yield self._metric("gauge", name, gauge.help, values)
        places = [({"stage": r["stage"], "rank": str(r["rank"]), "host": r["host"], "pid": str(r["pid"])}, 1.0) for r in ranks]
        yield self._metric("gauge", "rank_info", "Where each rank of the present worker group is; 1.", places)
        states = [({"stage": stage, "state": state}, s) for stage, totals in stages.items() for state, s in totals["states"].items()]
        yield self._metric("counter", "goodput_seconds", "Allocated worker seconds, each in exactly one state.", states)
        yield self._metric("counter", "restarts", "Restarts of the worker group, by failure class.", restarts)
        yield self._step_seconds(stages)

    def _metric(self, kind: str, name: str, what: str, rows: Iterable[Sample]) -> Metric:
        metric = Metric(f"reactdiff_{name}", what, kind)
        for labels, value in rows:
            metric.add_sample(metric.name + "_total" * (kind == "counter"), {**self._labels, **labels}, value)
        return metric

    def _step_seconds(self, stages: dict[str, Totals]) -> Metric:
        metric = Metric("reactdiff_step_seconds", "Seconds of a rank in a phase of a step, of steps with that phase.", "histogram")
        bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
        for stage, totals in stages.items():
            for phase, spent in totals["phases"].items():
                labels = {**self._labels, "stage": stage, "phase": phase}
                for bound, count in zip(bounds, accumulate(spent["counts"]), strict=True):
                    metric.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, count)
                metric.add_sample(f"{metric.name}_sum", labels, spent["seconds"])
                metric.add_sample(f"{metric.name}_count", labels, sum(spent["counts"]))
        return metric

    def _noting_scrapes(self, app: Callable[..., list[bytes]]) -> Callable[..., list[bytes]]:
        """The same application, noting which version of the numbers has gone out."""

        def answer(environ: Any, start_response: Any) -> list[bytes]:
            version = self._version

            def sent() -> None:
                self._scraped = max(self._scraped, version)

            return _Body(app(environ, start_response), sent)

        return answer


class _Body(list[bytes]):
    """A response body that tells when it has gone out: the server asks for a next part after it wrote the last one."""

    def __init__(self, parts: list[bytes], sent: Callable[[], None]):
        super().__init__(parts)
        self._sent = sent

    def __iter__(self) -> Iterator[bytes]:
        yield from super().__iter__()
        self._sent()
