"""How fast a rank reads from object storage: our stream against the wire and against stock webdataset, over the same bytes.

The wire is boto3's cheapest way into memory: `readinto` of the public StreamingBody, into memory that is there already, the very
ranges that our stream asked for, on as many threads. Every measurement is a process of its own. It reads the dataset twice to
warm up, since a process's new memory costs more than anything else here, and is measured while it reads it again.
"""

import itertools
import multiprocessing
import resource
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from cluster.bench.noise_dataset import SPLIT
from cluster.data.manifest import load_manifest
from cluster.data.reader import Reader
from cluster.data.shards import stock
from cluster.data.stream import Share, Stream
from cluster.storage import open_store
from cluster.storage.base import OnBytes, Store, ignore_bytes
from cluster.storage.s3 import S3Store
from reactdiff.data.order import Order
from reactdiff.stage import Stage

T = TypeVar("T")
Done = Callable[[int], bool]
"""Told how many items came (the wire: ranges) whenever some did; whether that is enough."""

SHUFFLED, SHUFFLED_BYTES = 1000, 1 << 30
"""Samples that webdataset shuffles among each other, and most bytes of them."""

CHUNK = 1 << 20
"""Bytes the wire asks a connection for at once: of all sizes the cheapest, by a factor of two to a whole range at once."""

WARM = 2
"""Epochs that are read before one is measured: the memory of all windows has been written to by then."""


class Undrawn:
    """Reads what a stage reads and draws nothing: noise and diffusion times are not data."""

    def __init__(self, stage: Stage):
        self.source, self._stage = stage.source, stage
        self._sides = stage.reads(0), stage.reads(1)

    def reads(self, side: int) -> dict[str, tuple[str, str]]:
        """What the stage reads."""
        return self._sides[side]

    def targets(self) -> set[str]:
        """Nothing: each item has its own."""
        return set()

    def draw(self, seed: int, position: int) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def module(self) -> nn.Module:
        """The stage's module."""
        return self._stage.module()


@dataclass(frozen=True)
class Task:
    """What all of them read: every item of a dataset once.

    Attributes:
        url: of the dataset, in object storage.
        stage: says what an item reads.
        batch: items of a batch.
        block: of the order.
        group: of the order.
        read_ahead: bytes our stream may read before they are asked for.
        readers: threads of ours and of the wire.
    """

    url: str
    stage: Stage
    batch: int
    block: int
    group: int
    read_ahead: int
    readers: int


class ByteSpan(NamedTuple):
    """Bytes that were asked for in one request."""

    key: str
    start: int
    length: int


@dataclass(frozen=True)
class Asked:
    """What our stream asked the store for in two epochs: ranges of tars in their order, other objects (manifest, indices), bytes."""

    ranges: list[ByteSpan]
    others: int
    bytes: int


@dataclass(frozen=True)
class LoadingCost:
    """One measurement.

    Attributes:
        seconds: of the measured epoch.
        first: seconds from the start to the first batch (the wire: range).
        cpu: seconds of this process and its children in the measured epoch.
        memory: most bytes the process held beyond those it held after its imports.
    """

    seconds: float
    first: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Figures:
    """One reader's measurements.

    Attributes:
        costs: round by round.
        items: of an epoch.
        requests: to the server for them.
        bytes: that came from it for them.
    """

    ROWS: ClassVar[dict[str, int]] = {
        "items/s": 0,
        "MB/s": 0,
        "MB/s, best": 0,
        "CPU s/GB": 3,
        "memory, MB": 0,
        "first batch, s": 3,
        "requests": 0,
        "GB read": 3,
    }
    """What there is, and the digits it is printed with."""

    costs: list[LoadingCost]
    items: int
    requests: float
    bytes: float

    def each(self, what: str) -> list[float]:
        """One of `ROWS`, round by round."""
        figures: dict[str, Callable[[LoadingCost], float]] = {
            "items/s": lambda cost: self.items / cost.seconds,
            "MB/s": lambda cost: self.bytes / 1e6 / cost.seconds,
            "MB/s, best": lambda _: self.bytes / 1e6 / min(cost.seconds for cost in self.costs),
            "CPU s/GB": lambda cost: cost.cpu * 1e9 / self.bytes,
            "memory, MB": lambda cost: cost.memory / 1e6,
            "first batch, s": lambda cost: cost.first,
            "requests": lambda cost: self.requests,
            "GB read": lambda cost: self.bytes / 1e9,
        }
        return [figures[what](cost) for cost in self.costs]


Rival = Callable[[Done], None]


def bench_data(task: Task, rounds: int, progress: Callable[[int, int], None]) -> dict[str, Figures]:
    """Measure all three in turns: "wire", "ours", "webdataset".

    Args:
        task: what they read.
        rounds: measurements of each.
        progress: told (measurements done, measurements in all).
    """
    asked = _alone(record, task)  # which also brings the data into the server's page cache
    shards = load_manifest(_s3(task.url)).split(SPLIT).shards
    items, ranges = 2 * sum(shards.clips), len(asked.ranges)
    rivals: dict[str, tuple[Callable[..., Rival], list[ByteSpan], int, float, float]] = {
        "wire": (wire, asked.ranges, ranges // 2, ranges / 2, sum(part.length for part in asked.ranges) / 2),
        "ours": (ours, [], items, (ranges + asked.others) / 2, asked.bytes / 2),
        "webdataset": (webdataset, [], items, len(shards), sum(shards.bytes)),
    }
    costs: dict[str, list[LoadingCost]] = {name: [] for name in rivals}
    for turn in range(rounds):
        for place, (name, (rival, replayed, units, _, _)) in enumerate(rivals.items()):
            costs[name].append(_alone(measure, rival, task, replayed, units))
            progress(turn * len(rivals) + place + 1, rounds * len(rivals))
    return {name: Figures(costs[name], items, requests, size) for name, (_, _, _, requests, size) in rivals.items()}


def server(url: str) -> str:
    """Name and address of the server that answers for this dataset."""
    store = _s3(url)
    client, where = store.raw("dataset.json")
    headers = client.head_object(**where)["ResponseMetadata"]["HTTPHeaders"]
    return f"{headers.get('server', 'a server without a name')} at {store.endpoint}"


def measure(rival: Callable[[Task, list[ByteSpan]], Rival], task: Task, ranges: list[ByteSpan], units: int) -> LoadingCost:
    """What reading costs in this process. Clients are made before the clock starts.

    Args:
        rival: reads on and on.
        task: what it reads.
        ranges: for the wire.
        units: of an epoch, as the rival counts them.
    """
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    held, came = _peak_memory(), 0
    marks: list[tuple[float, float]] = []  # wall and CPU seconds: start, first batch, warm, an epoch later

    def done(count: int) -> bool:
        nonlocal came
        came += count
        for reached in (1, WARM * units, (WARM + 1) * units)[len(marks) - 1 :]:
            if came >= reached:
                marks.append((time.perf_counter(), _cpu_seconds()))
        return came >= (WARM + 1) * units

    read = rival(task, ranges)
    marks.append((time.perf_counter(), _cpu_seconds()))
    read(done)
    start, first, warm, end = marks[:4]
    return LoadingCost(end[0] - warm[0], first[0] - start[0], end[1] - warm[1], _peak_memory() - held)


def wire(task: Task, ranges: list[ByteSpan]) -> Rival:
    """Get these ranges in this order, each by the next free thread, each into its own memory again and again."""
    store = _s3(task.url)
    client, _ = store.raw(ranges[0].key)
    places = {key: store.raw(key)[1] for key in {part.key for part in ranges}}
    buffers = [memoryview(bytearray(max(part.length for part in ranges))) for _ in range(task.readers)]

    def read(done: Done) -> None:
        left, lock = itertools.cycle(ranges), Lock()  # its next() is atomic

        def lane(buffer: memoryview) -> None:
            for key, start, length in left:
                body = client.get_object(**places[key], Range=f"bytes={start}-{start + length - 1}")["Body"]
                at = 0
                while at < length and (count := body.readinto(buffer[at : min(length, at + CHUNK)])):
                    at += count
                assert at == length, f"{key}: {at} of {length} bytes came"
                body.close()
                with lock:
                    if done(1):
                        return

        with ThreadPoolExecutor(task.readers) as pool:
            for lane_done in [pool.submit(lane, buffer) for buffer in buffers]:
                lane_done.result()

    return read


def ours(task: Task, _: list[ByteSpan]) -> Rival:
    """The stream of a single rank: start-up (manifest, indices) and all batches, verified and decoded."""
    store = open_store(task.url)

    def read(done: Done) -> None:
        for batch in streamed(store, task, epochs=WARM + 2):
            if done(len(batch["weight"])):
                break

    return read


def webdataset(task: Task, _: list[ByteSpan]) -> Rival:
    """Stock webdataset over `pipe:curl`: samples shuffled and decoded, the two items of each, in batches; whole tars, unverified."""
    store = _s3(task.url)

    def read(done: Done) -> None:
        while True:
            for batch in rival_batches(store, task):
                if done(len(next(iter(batch.values())))):
                    return

    return read


def rival_batches(store: S3Store, task: Task) -> Iterator[dict[str, torch.Tensor]]:
    """Stock webdataset's tensors of each batch of an epoch."""
    manifest = load_manifest(store)
    shards = manifest.split(SPLIT).shards
    places = [store.raw(f"{manifest.shard(SPLIT, position)}.tar") for position in range(len(shards))]
    signed = [client.generate_presigned_url("get_object", Params=where) for client, where in places]
    buffer = min(SHUFFLED, SHUFFLED_BYTES * sum(shards.clips) // sum(shards.bytes))

    def items(samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            for side in range(2):
                yield {name: sample[f"{person}.{stream}.npy"] for name, (person, stream) in task.stage.reads(side).items()}

    samples = stock([f"pipe:curl -sSf {shlex.quote(url)}" for url in signed], buffer)
    for batch in samples.compose(items).batched(task.batch):
        yield {name: torch.from_numpy(array) for name, array in batch.items()}


def record(task: Task) -> Asked:
    """What our stream asks for in two epochs."""
    store = _Recorder(task.url)
    for _ in streamed(store, task, epochs=2):
        pass
    return Asked(store.ranges, store.others, store.bytes_read)


class _Recorder(S3Store):
    """A store that notes what it is asked for."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        super().__init__(parts.netloc, parts.path.strip("/"))
        self.ranges: list[ByteSpan] = []
        self.others = 0

    def get(self, key: str) -> tuple[bytes, str]:
        """An object's content and its etag."""
        self.others += 1
        return super().get(key)

    def read_into(self, key: str, start: int, *buffers: memoryview, on_bytes: OnBytes = ignore_bytes) -> None:
        """Fill buffers."""
        self.ranges.append(ByteSpan(key, start, sum(map(len, buffers))))
        super().read_into(key, start, *buffers, on_bytes=on_bytes)


def streamed(store: Store, task: Task, epochs: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each batch of our stream."""
    reader = Reader(store, load_manifest(store), SPLIT)
    order = Order(2 * reader.counts, 0, task.block, task.group)
    share = Share(task.batch, epochs * order.items, ranks=1, rank=0)
    stream = Stream(reader, task.stage, order, share, 0, task.read_ahead, task.readers)
    try:
        for batch in stream.batches(0):
            yield batch.tensors
    finally:
        stream.close()


def _s3(url: str) -> S3Store:
    store = open_store(url)
    if not isinstance(store, S3Store):
        raise ValueError(f"{url} is a folder, which has no wire: give s3://bucket/prefix, or leave --url out for a server of our own")
    return store


def _alone(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result from a process of its own: a fork of one that has imported everything and run nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *arguments).result()


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _peak_memory() -> int:
    """Most bytes this process itself has held; `ru_maxrss` also counts its parent's before it became a program of its own."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
