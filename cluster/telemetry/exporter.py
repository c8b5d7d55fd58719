"""What Prometheus sees of a run: one endpoint beside the driver, fed with the meters' snapshots.

Labels are run, life, trial and stage, and the rank on what is a rank's own; counters and histograms are sums over
ranks, so a thousand ranks cost a scrape no more of them than one does. `docs/telemetry.md` lists the metrics.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app, start_http_server

from cluster.runtime.failures import TABLE
from cluster.telemetry.books import BOOK_STATES, Books
from cluster.telemetry.meter import BUCKETS, Snapshot, Tally, Totals
from cluster.telemetry.metrics import METRICS, NAMED

POLL = 0.1
"""Seconds between two looks of `drain`."""

RESTARTS = (*(failure.name for failure in TABLE if failure.retried), "resized")
"""What ranks are started again for, each told from the beginning: a counter that appears at 1 has, for a Prometheus, never risen."""

LONGEST = 180
"""Characters of a target file's name before it is cut: a file system takes 255 bytes, a temporary name and a hash among them."""

Sample = tuple[dict[str, str], float]


class Exporter:
    """Serves `/metrics` for one life of a run; within a life no counter falls, whatever happens to the ranks.

    Attributes:
        tally: the sums over ranks that it serves.
        books: where the seconds of the life's workers went.
        port: the port it listens on, chosen by the system when 0 was asked for.

    Raises:
        ValueError: if the address cannot be listened on.
    """

    def __init__(
        self, run: str, life: int, trial: str = "", host: str = "127.0.0.1", port: int = 0, clock: Callable[[], float] | None = None
    ):
        self.tally, self.books = Tally(), Books(life, clock)
        self._labels = {"run": run, "life": str(life), "trial": trial}
        self._lock = threading.Lock()
        self._restarts = dict.fromkeys(RESTARTS, 0)
        self._at, self._failed, self._budget = "", "", 0.0
        self._been = set[str]()
        self._spent_before = 0.0
        self._tasks: dict[str, int] = {}
        self._waited = 0.0
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

    def gone(self) -> None:
        """The ranks are gone, and with them what only they told; no counter falls."""
        with self._lock:
            self.tally.gone()
            self._version += 1

    def restarts(self, kind: str) -> None:
        """Count a restart of the worker group, by one of `RESTARTS`."""
        with self._lock:
            self._restarts[kind] += 1
            self._version += 1

    def at(self, step: str) -> None:
        """The run is at this step from now on; empty: at none."""
        with self._lock:
            self._at = step
            self._been |= {step} if step else set()
            self._version += 1

    def failed(self, kind: str) -> None:
        """A failure of this class ends the run."""
        with self._lock:
            self._failed, self._at = kind, ""
            self._version += 1

    def tasks_done(self, step: str, done: int) -> None:
        """So many tasks of a step are done."""
        with self._lock:
            self._tasks[step] = done
            self._version += 1

    def money(self, spent_before: float, budget: float) -> None:
        """What earlier lives have cost, and what the run may cost, in dollars; 0: no limit."""
        self._spent_before, self._budget = spent_before, budget

    def waited(self, seconds: float) -> None:
        """Count seconds in which there was no room for the ranks."""
        with self._lock:
            self._waited += seconds
            self._version += 1

    def write_target(self, folder: str | Path) -> None:
        """Let a Prometheus find this exporter: it watches `<folder>/*.json` (file_sd). `close` takes the file back.

        A run (or trial) has one file, so a life replaces the file of one that died without closing.
        """
        path = Path(folder) / f"{_file_name('+'.join(filter(None, (self._labels['run'], self._labels['trial']))))}.json"
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
            waited: list[Sample] = [({}, self._waited)]
            been = sorted(self._been)
            at: list[Sample] = [({"stage": step}, float(step == self._at)) for step in been]
            failed: list[Sample] = [({"class": self._failed}, 1.0)] if self._failed else []
            tasks: list[Sample] = [({"stage": step}, done) for step, done in self._tasks.items()]
        for metric in METRICS:
            name = metric.name
            if metric.source == "totals":
                sums: dict[str, Any] = dict(stages)
                yield self._metric(name, [({"stage": stage}, totals[metric.key]) for stage, totals in sums.items()])
            elif metric.source == "rank 0":
                yield self._metric(name, [({"stage": stage}, latest[name]) for stage, latest in gauges.items() if name in latest])
            elif metric.source == "every rank":
                here = [r for r in ranks if name in r["gauges"]]
                yield self._metric(name, [({"stage": r["stage"], "rank": str(r["rank"])}, r["gauges"][name]) for r in here])
        places = [({"stage": r["stage"], "rank": str(r["rank"]), "host": r["host"], "pid": str(r["pid"])}, 1.0) for r in ranks]
        phases = Counter((r["stage"], r["phase"]) for r in ranks)
        yield self._metric("rank_info", places)
        yield self._metric("ranks", [({"stage": stage, "phase": phase}, float(count)) for (stage, phase), count in phases.items()])
        yield self._metric("at", at)
        yield self._metric("heartbeat_seconds", [({}, time.time())])
        yield self._metric("tasks_done", tasks)
        yield self._metric("failed", failed)
        yield self._metric("cost_dollars", [({}, self._cost())])
        yield self._metric("budget_dollars", [({}, self._budget)] if self._budget else [])
        booked = self.books.states()
        begun = dict.fromkeys((*been, *(stage for stage, _ in booked)))
        states = [({"stage": stage, "state": state}, booked.get((stage, state), 0.0)) for stage in begun for state in BOOK_STATES]
        yield self._metric("goodput_seconds", states)
        yield self._metric("restarts", restarts)
        yield self._metric("waiting_seconds", waited)
        yield self._step_seconds(stages)

    def _cost(self) -> float:
        return self._spent_before + self.books.cost()

    def _metric(self, name: str, rows: Iterable[Sample] = ()) -> Metric:
        spec = NAMED[name]
        metric = Metric(f"reactdiff_{name}", spec.help, spec.kind)
        for labels, value in rows:
            assert tuple(labels) == spec.labels, f"{name} has the labels {spec.labels}"
            metric.add_sample(metric.name + "_total" * (spec.kind == "counter"), {**self._labels, **labels}, value)
        return metric

    def _step_seconds(self, stages: dict[str, Totals]) -> Metric:
        metric = self._metric("step_seconds")
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


def _file_name(text: str) -> str:
    """A text as the name of a file: as it is where it can be, else as much of it as can be, and a hash of all."""
    name = re.sub(r"[^\w.,+=:@%()\[\]{} '\"-]", "_", text, flags=re.ASCII)
    return name if name == text and len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class _Body(list[bytes]):
    """A response body that tells when it has gone out: the server asks for a next part after it wrote the last one."""

    def __init__(self, parts: list[bytes], sent: Callable[[], None]):
        super().__init__(parts)
        self._sent = sent

    def __iter__(self) -> Iterator[bytes]:
        yield from super().__iter__()
        self._sent()
