"""What each rank said, and why it ended, in the run's folder: `logs/<life>.<attempt>/<stage>-rank-<rank>.log`.

A rank's lines are written within a second, so those of one that is killed are there. A healthy rank says that it began and that it ended;
what it says beside that are warnings, and of those that come often one a minute is kept.
"""

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cluster.runs.state import Attempt
from cluster.storage import StorageError, Store
from cluster.storage.parallel import parallel_map
from cluster.telemetry.repeating import repeating

FOLDER = "logs"

RANK_BYTES = 64_000
"""Most bytes of a rank's log; the last ones are kept."""

ALL_BYTES = 20_000_000
"""Most bytes of all logs of a run; the oldest attempts' go."""

ALL_LOGS = 4_000
"""Most logs of a run; listing them is part of each start."""

EVERY = 1.0
"""Seconds between two writes of a log that has grown."""

SAME = 60.0
"""Seconds in which a message of one place of the program is kept once; at its next time it is said how often it came."""


def log_folder(life: int, attempt: int) -> str:
    """Where the logs of an attempt are."""
    return f"{FOLDER}/{Attempt(life, attempt)}"


class RankLog(logging.Handler):
    """The log of one rank, as it is kept.

    Args:
        store: the run's folder.
        key: of the log.
        ranks: of its group, who share the room there is.
        clock: seconds of Unix time.
    """

    def __init__(self, store: Store, key: str, ranks: int, clock: Callable[[], float] = time.time):
        super().__init__(logging.WARNING)
        self._store, self._key, self._clock = store, key, clock
        self._lines: deque[str] = deque()
        self._bytes, self._most = 0, min(RANK_BYTES, ALL_BYTES // 4 // ranks)
        self._told: dict[tuple[str, int], tuple[float, int]] = {}
        self._new = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message, unless one of the same place came within the last minute."""
        place, now = (record.pathname, record.lineno), self._clock()
        since, count = self._told.get(place, (now - SAME, 0))
        if now - since < SAME:
            self._told[place] = since, count + 1
            return
        self._told[place] = now, 0
        more = f" ({count} more of these since the last one)" if count else ""
        self.say(f"{record.levelname} {record.name}: {record.getMessage()}{more}")

    def say(self, text: str) -> None:
        """Keep a line, or several."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(self._clock()))} {text}\n"
        self._lines.append(line)
        self._bytes += len(line.encode())
        while self._bytes > self._most and len(self._lines) > 1:
            self._bytes -= len(self._lines.popleft().encode())
        self._new = True

    def write(self) -> None:
        """Write what there is, if there is something new; a store that does not answer is asked again later."""
        if self._new:
            self._new = False
            try:
                self._store.put(self._key, "".join(list(self._lines)).encode()[-self._most :])
            except StorageError:
                self._new = True


@contextmanager
def rank_log(store: Store, key: str, ranks: int, begins: str) -> Iterator[RankLog]:
    """Keep what this process logs while the block runs, and what ends it.

    Args:
        store: the run's folder.
        key: of the log.
        ranks: of its group.
        begins: its first line.
    """
    log = RankLog(store, key, ranks)
    log.say(begins)

    logging.getLogger().addHandler(log)
    try:
        with repeating(log.write, EVERY, "log"):
            yield log
        log.say("ended")
    except BaseException:
        log.say(f"ended by an error\n{traceback.format_exc()}")
        raise
    finally:
        logging.getLogger().removeHandler(log)
        log.write()


def write_end(store: Store, life: int, attempt: int, stage: str, text: str) -> None:
    """Keep why a group of ranks ended."""
    with suppress(StorageError):  # its state says it too
        store.put(f"{log_folder(life, attempt)}/{stage}-end.txt", f"{text}\n".encode()[:RANK_BYTES])


def make_room(store: Store) -> None:
    """Delete the logs of the oldest attempts where all together are more than three quarters of what is kept, in bytes or in objects."""
    sizes: dict[str, dict[str, int]] = {}
    for entry in store.list(f"{FOLDER}/"):
        sizes.setdefault(entry.key.split("/")[1], {})[entry.key] = entry.size
    size, count, old = sum(sum(of.values()) for of in sizes.values()), sum(map(len, sizes.values())), list[str]()
    for attempt in sorted(sizes, key=Attempt.parse)[:-1]:
        if size <= 3 * ALL_BYTES // 4 and count <= 3 * ALL_LOGS // 4:
            break
        size, count = size - sum(sizes[attempt].values()), count - len(sizes[attempt])
        old += sizes[attempt]
    for _ in parallel_map(store.delete, old):
        pass
