"""Show where the time and the money of a run go, and say what binds it: from its folder alone, wherever it runs.

On a terminal it goes on until Ctrl-C or the run's end.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live

from cluster import cli
from cluster.runs.saved import open_folder
from cluster.runs.state import read_state
from cluster.storage import Permanent, StorageError, Store
from cluster.storage.retry import cancel_retries_on
from cluster.telemetry.books_log import read_books
from cluster.telemetry.receipt import live_table

EVERY = 2.0
"""Seconds between two looks."""

LOG_WIDTH = 140
"""Columns where there is no terminal."""


def main() -> int:
    """Parse the command line and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_run(parser)
    parser.add_argument("--once", action="store_true", help="look once")
    arguments = parser.parse_args()
    store = open_folder(arguments.run, arguments.store).store
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, markup=False, highlight=False, emoji=False)
    silence = Silence()
    shown, over = _look(store, silence)
    if arguments.once or not console.is_terminal:
        console.print(shown)
        return 0
    with Live(shown, console=console, auto_refresh=False) as live:
        if not over:
            follow(shown, lambda: _look(store, silence), lambda now: live.update(now, refresh=True))
    return 0


def follow(
    shown: Group, look: Callable[[], tuple[Group, bool]], show: Callable[[Group], None], pause: Callable[[float], None] = time.sleep
) -> None:
    """Look at a run until it has ended; while its store does not answer, that is shown above what was seen last.

    Args:
        shown: what was seen last.
        look: what there is to see, and whether the run has ended.
        show: takes it.
        pause: waits so many seconds.

    Raises:
        Permanent: where to look again is no use.
    """
    (at_once := threading.Event()).set()
    cancel_retries_on(at_once)  # the next look tries again, and until then it is said that this one failed
    over = False
    while not over:
        pause(EVERY)
        try:
            shown, over = look()
            show(shown)
        except Permanent:
            raise
        except StorageError as error:
            show(Group(f"the store does not answer, and this was seen before: {error}", shown))


class Silence:
    """How long a driver has written nothing, by this machine's clock, for the driver's may be another; only the first look believes it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last, self._since = clock, -1, 0.0

    def after(self, until: int) -> float:
        """Seconds without a newer record than this, which says that it ends so many milliseconds after 1970."""
        now = self._clock()
        if self._last < 0:
            self._since = now - max(0.0, time.time() - until / 1000)
        elif until != self._last:
            self._since = now
        self._last = until
        return now - self._since


def _look(store: Store, silence: Silence) -> tuple[Group, bool]:
    """What there is to see, and whether the run has ended."""
    state = read_state(store)
    if state is None:
        raise ValueError(f"run {store.url} ended before it began (no state.json): start it again with jobs/train.py")
    status = f"{state.status}{f' in {state.stage}' if state.stage else ''}, life {state.life}{f': {state.why}' if state.why else ''}"
    records = read_books(store)
    silent = silence.after(records[-1]["until"]) if records else 0.0
    return Group(f"{store.url}: {status}", live_table(records, silent)), state.status != "RUNNING"


if __name__ == "__main__":
    sys.exit(cli.run(main))
