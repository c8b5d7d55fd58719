"""Drivers that are stepped by a seeded scheduler, one operation of the store at a time, and a checker over what they write.

Every process has threads, a clock of its own, and may be stopped, cut off from the store, or killed between any two operations. What
they run is the real lease, the real lives and attempts and the real checkpoints; only ranks' mathematics is left out.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch

from cluster.runs import checkpoint
from cluster.runs.checkpoint import DamagedCheckpoint
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.inventory import remove_orphans
from cluster.runs.lease import BEAT, Holder, Lease
from cluster.runs.lineage import open_attempt
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, State, Superseded, assert_newest_life, open_life, read_state, write_state
from cluster.storage import AlreadyExists, Entry, NotFound, Stale, Store
from cluster.storage.base import ByteCounter, OnBytes, ignore_bytes

STAGE = "autoencoder"
STEP = 6
EXPORT = f"exports/{STAGE}.json"
WRITES = ("put", "create", "replace", "delete")


class Killed(BaseException):
    """What unwinds the thread of a process that is no more."""


class MemoryStore(Store):
    """Objects in a dictionary."""

    node_local = True

    def __init__(self) -> None:
        super().__init__("memory", ByteCounter())
        self.objects: dict[str, bytes] = {}
        self._etags: dict[str, str] = {}
        self._writes = 0

    def at(self, prefix: str) -> Store:
        raise NotImplementedError

    def get(self, key: str) -> tuple[bytes, str]:
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key], self._etags[key]

    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        raise NotImplementedError

    def size(self, key: str) -> int:
        return len(self.get(key)[0])

    def put(self, key: str, data: bytes) -> None:
        self._writes += 1
        self.objects[key], self._etags[key] = data, str(self._writes)

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def create(self, key: str, data: bytes) -> str:
        if key in self.objects:
            raise AlreadyExists(key)
        self.put(key, data)
        return self._etags[key]

    def replace(self, key: str, data: bytes, etag: str) -> str:
        if self._etags.get(key) != etag:
            raise Stale(key)
        self.put(key, data)
        return self._etags[key]

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from [Entry(key, len(self.objects[key])) for key in sorted(self.objects) if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)
        self._etags.pop(key, None)

    def delete_unfinished(self) -> None:
        """Nothing is ever half there."""


class SteppedStore(MemoryStore):
    """A process's way to the shared objects: each operation waits until the scheduler lets it happen, and writes are checked."""

    def __init__(self, world: "World", process: "Stepped"):
        super().__init__()
        self._world, self._process, self._shared = world, process, world.store

    def __getattribute__(self, name: str) -> Any:
        if name not in (*WRITES, "get", "size", "list"):
            return super().__getattribute__(name)
        return partial(self._do, getattr(self._shared, name), name)

    def _do(self, operation: Callable[..., Any], name: str, key: str = "", *given: Any) -> Any:
        self._world.pause(name, key)
        before = self._world.reader_best() if name == "delete" else 0
        done = operation(key, *given)
        done = iter(list(done)) if name == "list" else done
        if name in WRITES:
            self._world.check(self._process, name, key, before)
        return done


class Stepped:
    """A process: a main thread and others, its own clock, and who it is once it knows (its life and attempt)."""

    def __init__(self, world: "World", name: str, offset: float):
        self.world, self.name, self.offset = world, name, offset
        self.by = Attempt(0, -1)
        self.frozen_until = self.cut_until = 0.0
        self.dead = False
        self.store = SteppedStore(world, self)

    def clock(self) -> float:
        return self.world.now + self.offset

    def start(self, function: Callable[..., None], *given: Any) -> "Task":
        """One more thread of this process."""
        task = Task(self, function, given)
        self.world.tasks.append(task)
        return task


class Task(threading.Thread):
    """A thread that runs only while the scheduler waits for it."""

    def __init__(self, process: Stepped, function: Callable[..., None], given: tuple[Any, ...]):
        super().__init__(daemon=True)
        self.process, self._function, self._given = process, function, given
        self.go, self.wake, self.pending, self.killed, self.ended = threading.Semaphore(0), 0.0, ("", ""), False, False
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.go.acquire()
            if not self.killed:
                self._function(*self._given)
        except (Killed, Superseded):
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.process.world.back.release()


class Lock:
    """A lock among the threads of a process that does not stop the scheduler."""

    def __init__(self, world: "World"):
        self._world, self._held = world, False

    def __enter__(self) -> None:
        while self._held:
            self._world.pause("lock", "")
        self._held = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held = False


class Inline:
    """A pool whose work is done when it is submitted."""

    def submit(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*given))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


class World:
    """Two drivers of one run, their worker groups, and what befalls them, all of one seed.

    Args:
        seed: of order, times and faults.
        end: progress at the end of the run.

    Attributes:
        violations: what the checker found.
        faults: what happened.
        log: (who, operation, key) of all writes.
        late: what attempts did to checkpoints after a newer one had begun.
        again: how often nobody was left and the command had to be given again.
    """

    def __init__(self, seed: int, end: int = 5 * STEP):
        self.random, self.end = random.Random(seed), end
        self.store = MemoryStore()
        self.now, self.tasks = 0.0, list[Task]()
        self.back = threading.Semaphore(0)
        self.keep = self.random.choice((1, 2, 3))
        self.violations: list[str] = []
        self.faults: list[str] = []
        self.log: list[tuple[Attempt, str, str]] = []
        self.durable, self._state_life, self._starts = 0, 0, 0
        self.again, self._left = 0, 6
        self.late: Counter[str] = Counter()

    # What processes call.

    def pause(self, operation: str, key: str, seconds: float = 0.0) -> None:
        """Let others run before this operation; or sleep."""
        task = threading.current_thread()
        assert isinstance(task, Task)
        if not task.killed:
            task.pending, task.wake = (operation, key), self.now + seconds
            self.back.release()
            task.go.acquire()
        if task.killed:
            raise Killed

    def sleep(self, seconds: float) -> None:
        self.pause("sleep", "", seconds)

    def committed(self, progress: int) -> None:
        """A commit has returned: whatever happens, nobody goes on from less any more."""
        self.durable = max(self.durable, progress)

    # The checker.

    def counted(self) -> list[str]:
        return checkpoint.list_checkpoints(self.store, STAGE)

    def reader_best(self) -> int:
        """The most progress that a reader would take for the run's."""
        return max((checkpoint.read_manifest(self.store, key).progress for key in self.counted()), default=0)

    def check(self, process: Stepped, operation: str, key: str, before: int) -> None:
        self.log.append((process.by, operation, key))
        who = f"{process.by}: {operation} {key}"
        begun = max(
            (Attempt.parse(e.key.removeprefix("lineage/").removesuffix(".json")) for e in self.store.list("lineage/")), default=None
        )
        newer = begun is not None and begun > process.by and process.by.life > 0
        if newer and key.startswith("checkpoints/"):
            self.late[operation] += 1
        if operation == "delete":
            if newer and self.reader_best() < min(before, self.durable):
                self.violations.append(f"{who} takes what the run goes on from, after {begun} has begun")
        elif newer and key.startswith("checkpoints/") and key in self.counted():
            self.violations.append(f"{who} is taken for the run's, after {begun} has begun")
        if key == "state.json":
            state = read_state(self.store)
            assert state is not None
            if state.life < self._state_life:
                self.violations.append(f"{who} replaces the state of life {self._state_life}")
            self._state_life = max(state.life, self._state_life)
        if key.startswith(("checkpoints/", "lineage/")):
            for one in self.counted():
                parts = {f"checkpoints/{STAGE}/{part.file}" for part in checkpoint.read_manifest(self.store, one).parts}
                if lacking := parts - self.store.objects.keys():
                    self.violations.append(f"{who} leaves {one}, which counts, without {lacking}")
            if self.durable > self.reader_best():
                self.violations.append(f"{who} leaves {self.reader_best()} of {self.durable} that were committed")

    # The scheduler.

    def run(self) -> None:
        """Start two drivers and step them until the run is done and every thread has ended."""
        for name in "AB":
            self.start(name, self.random.uniform(0, 40))
        while self.tasks or self._unfinished():
            ready = [task for task in self.tasks if self._ready_at(task) <= self.now]
            if not ready:
                self.now = min(map(self._ready_at, self.tasks))
                continue
            task = self.random.choice(ready)
            if self._left and self.random.random() < self._risk(task):
                self._befall(task.process)
                continue
            self.now += self.random.uniform(0, 0.2)
            self._step(task)
            assert self.now < 4000, f"it does not end: {self.faults}"

    def _unfinished(self) -> bool:
        """Whether both drivers have ended before the run did: each saw the other take over. Then somebody gives the command again."""
        state = read_state(self.store)
        if state is None or state.status != "DONE":
            self.again += 1
            self.start("A", 0.0)
            return True
        return False

    def start(self, name: str, delay: float) -> None:
        """Give the command, after a while."""
        self._starts += 1
        process = Stepped(self, name, self.random.choice((0.0, 0.0, 3600.0, -3600.0)))
        process.start(driver, process, Holder(name, f"boot of {name}", self._starts, "1"), delay)

    def _ready_at(self, task: Task) -> float:
        process = task.process
        online = process.cut_until if task.pending[0] not in ("", "sleep", "lock") else 0.0
        return max(task.wake, process.frozen_until, online)

    def _risk(self, task: Task) -> float:
        """Faults come where it matters: about the creates, and where a process has looked whether it is superseded."""
        operation, key = task.pending
        return 0.15 if operation == "create" or key.startswith("lives/") else 0.02

    def _befall(self, process: Stepped) -> None:
        self._left -= 1
        kind, seconds = self.random.choice(("stopped", "stopped", "cut off", "killed")), self.random.uniform(5, 120)
        self.faults.append(kind)
        if kind == "stopped":
            process.frozen_until = self.now + seconds
        elif kind == "cut off":
            process.cut_until = self.now + seconds
        else:
            process.dead = True
            for task in [task for task in self.tasks if task.process is process]:
                task.killed = True
                self._step(task)
            if process.name in "AB":
                self.start(process.name, self.random.uniform(0, 20))

    def _step(self, task: Task) -> None:
        task.go.release()
        self.back.acquire()
        if task.ended:
            self.tasks.remove(task)
            if task.error:
                raise task.error


def driver(process: Stepped, identity: Holder, delay: float) -> None:
    """The driver of the run: lease, life, state, worker groups one after the other until the stage is at its end."""
    world, store = process.world, process.store
    world.sleep(delay)
    lease = Lease(store, "train", clock=process.clock, sleep=world.sleep, process=identity, beating=False)
    lease._lock = Lock(world)  # type: ignore[assignment]
    lease.take()
    process.start(beat, process, lease)
    try:
        while True:
            try:
                live(process, lease)
                return
            except Superseded:
                if not lease.is_ours():
                    raise
    finally:
        lease._ended.set()
        lease.release()


def live(process: Stepped, lease: Lease) -> None:
    """One life of a driver."""
    world, store = process.world, process.store
    lease.assert_held()
    life = open_life(store, {})
    process.by = Attempt(life, -1)
    state = State("RUNNING", life, "", "")
    write_state(store, state)
    while not store.exists(EXPORT):
        lease.assert_held()
        group = Stepped(world, f"group of {process.name}", 0.0)
        group.by = process.by = Attempt(life, open_attempt(store, life))
        rank = group.start(train, group)
        patience = world.random.uniform(10, 60)
        while not rank.ended and not group.dead and patience > 0:  # then it is given up, though it may only be cut off
            world.sleep(2.0)
            patience -= 2.0
        lease.assert_held()
        export(world, store)
    write_state(store, State("DONE", life, "", ""))


def beat(process: Stepped, lease: Lease) -> None:
    """The thread that keeps a lease fresh."""
    while not lease._ended.is_set() and not lease.lost.is_set():
        process.world.sleep(BEAT)
        if not lease._ended.is_set():
            lease.beat()


def export(world: World, store: Store) -> None:
    """Keep what the stage has come to, if it is at its end."""
    for key in checkpoint.list_checkpoints(store, STAGE):
        try:
            found = checkpoint.read_manifest(store, key)
        except DamagedCheckpoint:
            continue
        if found.progress == world.end:
            try:
                store.create(EXPORT, found.parts[0].hash.encode())
            except AlreadyExists:
                pass
            return


def train(process: Stepped) -> None:
    """What rank 0 of a group does: go on from the newest checkpoint, commit one at every step."""
    world, store, by = process.world, process.store, process.by
    superseded = partial(assert_newest_life, store, *by)
    writer = CheckpointWriter(store, lambda value: [value], 0, Retention(world.keep), superseded)
    writer._pool = writer._cleaner = Inline()  # type: ignore[assignment]
    superseded()
    remove_orphans(store, STAGE, by)
    progress = resume(process)
    while progress < world.end:
        world.sleep(1.0)
        progress += STEP
        facts = {"stage": STAGE, "progress": progress, "steps": progress // STEP, "dataset": "", "config": {}}
        tensors = {"master": torch.full((2,), float(progress))}  # the same for whoever comes so far
        weights = SimpleNamespace(name="w", shape=(2,), start=0, tensors=tensors)
        writer.begin([weights], {}, **facts, life=by.life, attempt=by.attempt)
        writer.commit()
        world.committed(progress)


def resume(process: Stepped) -> int:
    """The progress that a group goes on from."""
    store = process.store
    for key in checkpoint.list_checkpoints(store, STAGE):
        try:
            one = checkpoint.read_manifest(store, key)
        except DamagedCheckpoint:
            continue
        return one.progress
    return 0
