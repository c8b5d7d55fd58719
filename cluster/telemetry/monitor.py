"""Where the ranks' snapshots go on the driver: all of them to Prometheus; speed, loss and scores to the progress bar."""

import time
from collections import deque
from collections.abc import Callable

from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Snapshot, Totals
from cluster.telemetry.reminder import Reminder


class Throughput:
    """Items per second and share of time waiting for data, over the last ten seconds or so."""

    WINDOW = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._past: deque[tuple[float, int, float, float]] = deque()

    def now(self, totals: Totals) -> tuple[float, float]:
        """The speed between the oldest totals kept and these."""
        self._past.append((self._clock(), totals["items"], totals["states"]["data_wait"], sum(totals["states"].values())))
        while len(self._past) > 2 and self._past[-1][0] - self._past[1][0] > self.WINDOW:
            self._past.popleft()
        (then, items, waited, spent), (here, more, longer, all_spent) = self._past[0], self._past[-1]
        return (more - items) / max(here - then, 1e-9), (longer - waited) / max(all_spent - spent, 1e-9)



class StageMonitor:
    """Takes the snapshots of one stage's ranks, and what happens to them, to the exporter and the display.

    Attributes:
        say: shows a line.
    """

    def __init__(self, stage: str, exporter: Exporter, display: Display):
        self.say = display.say
        self._stage, self._exporter, self._display = stage, exporter, display
        self._throughput, self._validated = Throughput(), 0.0
        self._waited, self._reminder = 0.0, Reminder()

    def restarted(self, reason: str, text: str) -> None:
        """The ranks are started again, for a class of failure or another reason, which a line tells."""
        self._exporter.restarts(reason)
        self.say(text)

    def waiting(self, waited: float, text: str) -> None:
        """Nothing trains, for so many seconds so far, since there is no room."""
        self._exporter.waited(max(0.0, waited - self._waited))
        self._waited = waited
        if self._reminder.due(waited):
            self.say(text)

    def placed(self) -> None:
        """There is room."""
        if self._reminder.told:
            self.say(f"there is room, after {self._waited:.0f} s")
        self._waited, self._reminder = 0.0, Reminder()

    def take(self, snapshot: Snapshot) -> None:
        """A rank has told its numbers."""
        tally = self._exporter.tally
        self._exporter.update(snapshot)
        gauges = tally.gauges().get(self._stage, {})
        if snapshot["rank"] == 0 and "loss" in gauges:
            self._display.update(int(gauges["progress_items"]), gauges["loss"], *self._throughput.now(tally.stages()[self._stage]))
        if (progress := gauges.get("val_progress_items", 0)) > self._validated:
            self._validated = progress
            self._display.say(f"val at {progress:,.0f} items: FRCorr {gauges['val_frcorr']:.3f}, FRDist {gauges['val_frdist']:.2f}")
