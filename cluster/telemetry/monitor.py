"""Where the ranks' snapshots go on the driver: all of them to Prometheus and the books; speed, loss and scores to the progress bar."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.telemetry.accounts import GroupBooks, PlaceBooks
from cluster.telemetry.books import NO_FAULT, NOWHERE, Berth
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
    """Takes the snapshots of one stage's ranks, and what happens to them, to the exporter, the books and the display.

    Args:
        stage: that is trained.
        exporter: has the books.
        display: shows it.
        fault: why the stage must be started again, if an earlier life ended in it by a fault.

    Attributes:
        say: shows a line.
    """

    def __init__(self, stage: str, exporter: Exporter, display: Display, fault: str = NO_FAULT):
        self.say = display.say
        self._stage, self._exporter, self._display = stage, exporter, display
        self._books, self._fault = exporter.books, fault
        self._idle: PlaceBooks | None = None
        self._ranks: GroupBooks | None = None
        self._until = 0.0
        self._throughput, self._validated = Throughput(), 0.0
        self._waited, self._reminder = 0.0, Reminder()

    def restarted(self, reason: str, text: str) -> None:
        """The ranks are started again, for a class of failure or another reason, which a line tells."""
        self._exporter.restarts(reason)
        self.say(text)
        self._fault = self._books.fault(reason, self._stage, text, restarts=True)

    def blame(self, reason: str, text: str) -> None:
        """What the ranks lose from here on is on the account of this, which ends the stage."""
        self._fault = self._books.fault(reason, self._stage, text)

    def placing(self, ranks: int) -> None:
        """So many ranks at least need room."""
        self.reserve([NOWHERE] * ranks, "waiting")

    def reserve(self, berths: Sequence[Berth], state: str = "idle") -> None:
        """These places are held, or waited for, beside those of the ranks."""
        self.release()
        self._idle = PlaceBooks(self._books, self._stage, berths, state, self._fault)

    def release(self) -> None:
        """They are not any more."""
        if self._idle:
            self._idle.close()
        self._idle = None

    def hold(self, berths: Sequence[Berth], progress: float, since: float, without: float, until: float) -> None:
        """What is known of when Ray holds these places for ranks, which go on from a checkpoint at this progress.

        Args:
            berths: of each rank.
            progress: of the checkpoint, in items.
            since: Unix time in seconds; 0: Ray was not asked yet.
            without: seconds since then in which it did not: until it gave them, and between two starts of the ranks.
            until: the same, of the end; 0: it has not come.
        """
        if since and not self._ranks:
            self._ranks = GroupBooks(self._books, self._stage, berths, progress, self._fault, since)
        if self._ranks:
            self._ranks.without(without)
        self._until = until

    def again(self, progress: float) -> None:
        """The ranks failed and are started again where they were, from a checkpoint at this progress."""
        self._exporter.gone()
        if self._ranks:
            self._ranks.lose(self._fault, progress)

    def give_back(self, left: bool = False, failed: bool = False) -> None:
        """Ray has the places of all ranks back, since they are done.

        Args:
            left: no, since they left at a checkpoint for what was told last.
            failed: no, since they failed as was told last.
        """
        if self._ranks:
            self._ranks.close(self._fault if left or failed else NO_FAULT, failed, self._until)
        self._exporter.gone()
        self._ranks, self._until = None, 0.0

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
        self.release()

    def take(self, snapshot: Snapshot) -> None:
        """A rank has told its numbers."""
        tally = self._exporter.tally
        self._exporter.update(snapshot)
        if self._ranks:
            self._ranks.hear(snapshot)
        gauges = tally.gauges().get(self._stage, {})
        if snapshot["rank"] == 0 and "loss" in gauges:
            self._display.update(int(gauges["progress_items"]), gauges["loss"], *self._throughput.now(tally.stages()[self._stage]))
        if (progress := gauges.get("val_progress_items", 0)) > self._validated:
            self._validated = progress
            self._display.say(f"val at {progress:,.0f} items: FRCorr {gauges['val_frcorr']:.3f}, FRDist {gauges['val_frdist']:.2f}")
