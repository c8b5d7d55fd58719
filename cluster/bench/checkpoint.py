"""How long a checkpoint holds up a step, against a plain copy of the same tensors into memory that is there, with a store that is slow.

A step is held up while the rank begins a checkpoint, publishes it and finishes it, each at a step of its own; what lies between, the
upload among it, goes on beside training and is waited for here without a clock.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention
from cluster.storage.base import Entry
from cluster.storage.folder import FolderStore
from cluster.training.engine import Fragment
from cluster.training.settings import KINDS

PARAMETERS = 300
"""Of the rank's part of a model; every other one has SMALL elements, as biases and norms do."""

SMALL = 256

REQUEST_SECONDS = 0.03
"""What the store takes for each request, at least."""


class Seconds(NamedTuple):
    """By the clock, and of the processor in the calling thread."""

    wall: float
    cpu: float


@dataclass
class HeldUp:
    """Rounds of one size.

    Attributes:
        copy: of the plain copy, round by round.
        begin: of `CheckpointWriter.begin`; before the first one there was `prepare`, as in training.
        publish: of `publish`.
        finish: of `finish`.
        requests: to the store.
    """

    copy: list[Seconds] = field(default_factory=list)
    begin: list[Seconds] = field(default_factory=list)
    publish: list[Seconds] = field(default_factory=list)
    finish: list[Seconds] = field(default_factory=list)
    requests: int = 0


class SlowFolder(FolderStore):
    """A folder whose every answer takes REQUEST_SECONDS more, and a count of them."""

    requests = 0

    def _wait(self) -> None:
        self.requests += 1
        time.sleep(REQUEST_SECONDS)

    def get(self, key: str) -> tuple[bytes, str]:
        """As in a folder."""
        self._wait()
        return super().get(key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """As in a folder."""
        self._wait()
        super().put(key, data)

    def create(self, key: str, data: bytes) -> str:
        """As in a folder."""
        self._wait()
        return super().create(key, data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As in a folder."""
        self._wait()
        yield from super().list(prefix)

    def delete(self, key: str) -> None:
        """As in a folder."""
        self._wait()
        super().delete(key)


def bench_checkpoint(size: int, rounds: int, progress: Callable[[int, int], None]) -> HeldUp:
    """Measure on one thread, as a rank on a CPU has.

    Args:
        size: bytes of the rank's part of the state.
        rounds: checkpoints, after a first one that is measured, too.
        progress: told (checkpoints done, checkpoints in all).
    """
    torch.set_num_threads(1)
    fragments = list(_fragments(size))
    sources = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
    targets = [torch.empty_like(tensor).fill_(0) for tensor in sources]
    found = HeldUp()
    with tempfile.TemporaryDirectory() as folder:
        store = SlowFolder(Path(folder))
        writer = CheckpointWriter(store, lambda value: [value], 0, Retention(1), lambda: None)
        writer.prepare(fragments, {}).result()
        for number in range(rounds + 1):
            found.copy.append(_seconds(lambda: _copy(targets, sources)))
            facts = {"stage": "autoencoder", "progress": number, "steps": number, "life": 1, "dataset": "", "config": {}}
            found.begin.append(_seconds(lambda facts=facts: writer.begin(fragments, {}, **facts)))  # type: ignore[misc]
            _wait_until(lambda: writer.uploaded)
            found.publish.append(_seconds(writer.publish))
            _wait_until(lambda: writer.written)
            found.finish.append(_seconds(writer.finish))
            progress(number + 1, rounds + 1)
        writer.close()
        found.requests = store.requests
    return found


def _fragments(size: int) -> Iterator[Fragment]:
    elements = size // (4 * len(KINDS))
    large = max(SMALL, 2 * elements // PARAMETERS - SMALL)
    for number in range(PARAMETERS):
        count = SMALL if number % 2 else large
        yield Fragment(f"blocks.{number}.weight", (count,), 0, {kind: torch.randn(count) for kind in KINDS})


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _seconds(work: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return Seconds(time.perf_counter() - wall, time.thread_time() - cpu)


def _wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.005)
