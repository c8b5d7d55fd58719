"""The lease of a folder of the store: one process works there at a time, and everybody can see which.

`lease.json` is taken by create, or by compare-and-swap from one that lapsed or was released, and its holder replaces it every few
seconds. What others go by is only whether it changes, each by its own clock; the times in it are for people. A lease keeps two
drivers from working at the same time, it does not keep a frozen one from waking up: what a run keeps is fenced by lives and attempts
(`cluster/runs/state.py`) as well.
"""

import datetime
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Self

from cluster.runs.state import Superseded
from cluster.storage import AlreadyExists, NotFound, Stale, StorageError, Store

LEASE = "lease.json"

BEAT = 5.0
"""Seconds between two heartbeats."""

LAPSE = 30.0
"""Seconds without a heartbeat after which another process may take the lease."""

LOOK = 1.0
"""Seconds between two looks of one that waits."""

SAY = 60.0
"""Seconds after which one that waits says again for whom."""

log = logging.getLogger(__name__)


class Held(StorageError):
    """Another process holds the lease, and it lives."""

    failure = "held"


@dataclass(frozen=True)
class Holder:
    """A process, told from every other one: also from one that has its number in another container, or after a reboot.

    Attributes:
        host: name of its machine, for people.
        boot: id of the machine's boot and of the namespace its number counts in; empty where the system does not tell.
        pid: its number.
        started: when the kernel says it began, in ticks since the boot.
    """

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "Holder":
        """The calling process."""
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()))

    def gone(self) -> bool:
        """Whether it was a process of this host that is no more; False where this host cannot know."""
        if not self.boot or self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's
        return _started(self.pid) not in ("", self.started)


@dataclass(frozen=True)
class Note:
    """What `lease.json` says.

    Attributes:
        process: of the holder.
        what: it does, for people.
        since: when it took the lease, by its own clock, for people.
        taking: of all times that a lease is taken each has its own, so that no two notes are equal.
        beat: counts the heartbeats.
        released: whether the holder has ended in order.
    """

    process: Holder
    what: str = "?"
    since: str = "?"
    taking: str = ""
    beat: int = 0
    released: bool = False

    @classmethod
    def from_json(cls, data: bytes) -> "Note":
        """Read one; what this program does not know of it, it leaves out, for another version may hold the lease."""
        try:
            values = json.loads(data)
            return cls(**{**_known(cls, values), "process": Holder(**_known(Holder, values["process"]))})
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls(Holder("an unknown host", "", 0, ""))

    def __str__(self) -> str:
        return f"host {self.process.host}, process {self.process.pid}, since {self.since} ({self.what})"


class Lease:
    """Holds a folder's lease from the beginning of a `with` to its end; a thread of its own keeps it fresh.

    Args:
        store: the folder.
        what: the holder does, for people; no secret.
        wait: for a holder that lives; otherwise it is refused. Whether it lives takes up to LAPSE seconds to see.
        on_wait: told who is waited for, when waiting begins and then every minute.
        clock: seconds that only grow.
        sleep: waits so many seconds.
        process: that holds it; this one, unless a test says another.
        beating: whether a thread beats; a test calls `beat` itself.

    Attributes:
        lost: set once another process has taken the lease.
    """

    def __init__(
        self,
        store: Store,
        what: str,
        wait: bool = True,
        on_wait: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        process: Holder | None = None,
        beating: bool = True,
    ):
        self._store, self._wait, self._on_wait, self._clock, self._sleep = store, wait, on_wait, clock, sleep
        self._note = Note(process or Holder.this(), what)
        self._beating = Thread(target=self._keep_beating, name="lease", daemon=True) if beating else None
        self._etag, self._beaten = "", 0.0
        self._lock, self._ended = Lock(), Event()
        self.lost = Event()

    def __enter__(self) -> Self:
        self.take()
        if self._beating:
            self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._beating:
            self._beating.join()
        self.release()

    def take(self) -> None:
        """Take the lease, now or when it is free.

        Raises:
            Held: if its holder lives and is not to be waited for.
        """
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._note = replace(self._note, since=since, taking=uuid.uuid4().hex)
        seen, still, looked, said = "", 0.0, self._clock(), -SAY
        began = looked
        while True:
            try:
                data, etag = self._store.get(LEASE)
            except NotFound:
                if self._taken():
                    return
                continue
            other, now = Note.from_json(data), self._clock()
            # A look counts for little more than the pause before it: while the store was away, or this process stood still, the
            # holder could not beat, or beat unseen.
            still = still + min(now - looked, 2 * LOOK) if etag == seen else 0.0
            beats, seen, looked = bool(seen) and etag != seen, etag, now
            if other.released or other.process.gone() or still >= LAPSE:
                if self._taken(etag):
                    return
                continue
            if beats and not self._wait:
                raise Held(
                    f"{self._store.url} is held by {other}, which is at work there: nothing was begun. "
                    "Give the same command again when it has ended, or end it first"
                )
            if self._wait and now - began - said >= SAY:
                said = now - began
                self._on_wait(f"{self._store.url} is held by {other}: waiting until it ends, or shows no life for {LAPSE:g} s")
            self._sleep(LOOK)

    def beat(self) -> None:
        """Show that the holder lives.

        Raises:
            StorageError: if the store cannot be reached: nobody else can take the lease either, while that lasts.
        """
        with self._lock:
            if not self.lost.is_set():
                self._swap(beat=self._note.beat + 1)

    def is_ours(self) -> bool:
        """Whether this process holds the lease now, as the store says.

        Raises:
            StorageError: if that cannot be seen.
        """
        self.beat()
        return not self.lost.is_set()

    def assert_held(self) -> None:
        """Check that this process may go on; looks into the store only if its heart stood still for so long that it may have lapsed.

        Raises:
            Superseded: if another process has taken the lease.
            StorageError: if that cannot be seen.
        """
        if self._clock() - self._beaten >= LAPSE:
            self.beat()
        self.assert_not_taken()

    def assert_not_taken(self) -> None:
        """Check the same by what the heartbeat has seen, without a look into the store, which may not answer just now.

        Raises:
            Superseded: if another process has taken the lease.
        """
        if self.lost.is_set():
            raise Superseded(
                f"{self._store.url}/{LEASE} was taken by another process, which goes on; this one stops without writing any more"
            )

    def release(self) -> None:
        """Let the next one take it at once. Where that cannot be written it takes a while longer."""
        with self._lock:
            if not self.lost.is_set():
                try:
                    self._swap(released=True)
                except StorageError as error:
                    log.warning("the lease of %s could not be released: %s", self._store.url, error)

    def _taken(self, etag: str = "") -> bool:
        """Whether the lease is ours now: taken from the note of this etag, or where there is none."""
        began, data = self._clock(), self._encoded()
        try:
            self._etag = self._store.replace(LEASE, data, etag) if etag else self._store.create(LEASE, data)
        except (AlreadyExists, Stale):
            return False
        self._beaten = began
        return True

    def _swap(self, **changes: Any) -> None:
        """Replace our note by a changed one, and learn whether it is still ours."""
        self._note, began = replace(self._note, **changes), self._clock()
        while True:
            try:
                self._etag = self._store.replace(LEASE, self._encoded(), self._etag)
                self._beaten = began
                return
            except Stale:
                try:
                    data, self._etag = self._store.get(LEASE)
                except NotFound:  # somebody deleted it, so anybody may take it
                    data = b""
                if Note.from_json(data).taking != self._note.taking:
                    self.lost.set()
                    return
                # else our own last write was done, though its answer was lost

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT) and not self.lost.is_set():
            try:
                self.beat()
            except StorageError as error:
                log.warning("no heartbeat to %s: %s", self._store.url, error)

    def _encoded(self) -> bytes:
        return json.dumps(asdict(self._note), indent=1).encode()


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _boot() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this host began, in ticks since the boot; empty where that cannot be seen."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if state in "ZX" else rest[18]  # dead, though its parent took no note yet
