"""Order -> ranged reads -> verified, decoded batches on this rank.

Every rank has every step; which of its positions a rank reads is a pure function of (step, ranks, rank). A window of steps is
read ahead of the one that is asked for, as large as memory allows: items that lie side by side in a shard come in one read,
whichever steps they are for, and arrays land in the tensors of their batches. Threads read; the order never follows them.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock

import numpy as np
import torch

from cluster.quarantine import Bad, Quarantine
from cluster.ranges import Range, Target
from cluster.reader import Reader
from cluster.shards import CorruptData
from reactdiff.data.order import Order, step_slice
from reactdiff.stage import Stage

DRAWN = 2
"""Steps whose random arrays are drawn ahead: they are larger than what is read, and quickly made."""

LARGEST = 1000
"""Steps of a window, at most."""


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step.

    Attributes:
        step: which step.
        positions: in the order of items.
        items: the items at these positions.
        tensors: name -> (items, ...) tensor, and `weight` (items,): 0 for a quarantined item, else 1. Their memory is used
            again once nobody holds them.
        ledger: sum of the CRC32C of all member bytes the share consists of.
        bytes: read for it, and for later steps along with it.
        corrupt: items that were found damaged here.
    """

    step: int
    positions: range
    items: list[int]
    tensors: dict[str, torch.Tensor]
    ledger: int
    bytes: int
    corrupt: tuple[Bad, ...] = ()

    @property
    def valid(self) -> int:
        """Items that count."""
        return int(self.tensors["weight"].sum())

    def split(self, parts: int) -> Iterator[dict[str, torch.Tensor]]:
        """Cut into micro-batches; some are smaller or empty where the share does not divide."""
        size = len(self.positions)
        for part in range(parts):
            start, end = part * size // parts, (part + 1) * size // parts
            yield {name: tensor[start:end] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Share:
    """Which part of every step is this rank's."""

    batch: int
    total: int
    ranks: int
    rank: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.total // self.batch)

    def positions(self, step: int) -> range:
        """This rank's positions of a step."""
        return step_slice(step, self.batch, self.total, self.ranks, self.rank)


class _Step:
    """A step that is being read: its tensors, and how much of them has not come yet."""

    def __init__(self, step: int, positions: range, items: list[int], tensors: dict[str, torch.Tensor]):
        self.step, self.positions, self.items, self.tensors = step, positions, items, tensors
        self.coming = 0
        self.bytes = 0
        self.checksums = [0] * len(items)
        self.corrupt: dict[int, Bad] = {}
        self.read: Future[None] = Future()
        self.drawn: Future[dict[str, torch.Tensor]] | None = None

    def fail(self, error: BaseException) -> None:
        """The step cannot be had."""
        if not self.read.done():
            self.read.set_exception(error)


class Stream:
    """Batches of one split, in order, from any step on.

    Args:
        reader: reads clips of the split.
        stage: says what an item reads and draws.
        order: which item is at a position.
        share: which positions of a step are read here.
        seed: keys the random arrays.
        read_ahead: bytes that are read before they are asked for; at least one step's.
        readers: threads that read and decode.
        pin: whether the tensors are to lie in memory that a GPU copies from by itself.
        quarantine: items that do not count; without one damaged data is an error.
    """

    def __init__(
        self,
        reader: Reader,
        stage: Stage,
        order: Order,
        share: Share,
        seed: int,
        read_ahead: int,
        readers: int,
        pin: bool = False,
        quarantine: Quarantine | None = None,
    ):
        self._reader, self._stage, self._order, self._share = reader, stage, order, share
        self._seed, self._quarantine = seed, quarantine
        self._sources = [stage.reads(side) for side in (0, 1)]
        self._kinds = {name: reader.array(source) for name, source in self._sources[0].items()}
        self._rows = -(-share.batch // share.ranks)
        self._memory, self._pin = _Memory(pin), pin
        step_bytes = self._rows * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._kinds.values())
        self._window = max(1, min(LARGEST, read_ahead // (2 * step_bytes)))
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="drawer")
        self._lock = Lock()

    def batches(self, first_step: int) -> Iterator[Batch]:
        """All steps from `first_step` to the end of the run; an empty share still gives a batch.

        Raises:
            CorruptData: if a member's bytes are not those of its index, and there is no quarantine.
            StorageError: if they cannot be read.
        """
        size, begun = 1, first_step  # the first windows are small, so that the first batch is there soon
        planned = self._planner.submit(self._plan, begun, size)
        while steps := deque(planned.result()):
            begun, size = begun + size, min(2 * size, self._window)
            planned = self._planner.submit(self._plan, begun, size)
            while steps:
                for step in islice(steps, 1 + DRAWN):
                    self._draw_ahead(step)
                yield self._finished(steps.popleft())

    def close(self) -> None:
        """Stop the readers."""
        for pool in (self._planner, self._drawer, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, first: int, count: int) -> list[_Step]:
        """Open these steps and begin to read them."""
        steps = self._opened(range(first, min(first + count, self._share.steps)))
        for step in steps[:DRAWN]:
            self._draw_ahead(step)
        clips: list[int] = []
        sources: list[tuple[str, str]] = []
        targets: list[Target] = []
        for step in steps:
            views = {name: memoryview(tensor.numpy().data).cast("B") for name, tensor in step.tensors.items()}
            for row, (item, position) in enumerate(zip(step.items, step.positions, strict=True)):
                if self._quarantine and self._quarantine.holds(item, position):
                    self._blank(step, row)
                    continue
                clip, side = divmod(item, 2)
                for name, source in self._sources[side].items():
                    size = len(views[name]) // self._rows
                    clips.append(clip)
                    sources.append(source)
                    targets.append(Target(views[name][row * size : (row + 1) * size], (step, row)))
                    step.coming += 1
            if not step.coming:
                step.read.set_result(None)
        ranges = self._reader.plan(np.array(clips, dtype=np.int64), sources, targets, self._pool.map)
        for part, owner in sorted(((part, self._first_owner(part)) for part in ranges), key=lambda pair: pair[1].step):
            self._pool.submit(self._fetch, part, owner)
        return steps

    def _opened(self, numbers: range) -> list[_Step]:
        """Steps of which nothing has been read."""
        shares = [self._share.positions(number) for number in numbers]
        positions = [np.arange(share.start, share.stop) for share in shares]
        items = iter(self._order.at(np.concatenate([*positions, np.empty(0, np.int64)])).tolist())
        return [
            _Step(
                number,
                share,
                list(islice(items, len(share))),
                {name: self._memory.take((self._rows, *k[0]), k[1]) for name, k in self._kinds.items()},
            )
            for number, share in zip(numbers, shares, strict=True)
        ]

    def _first_owner(self, part: Range) -> _Step:
        """The first step that a range is for."""
        return min((target.owner[0] for piece in part.pieces for target in piece.targets), key=lambda step: step.step)

    def _wanted_again(self, step: int) -> bool:
        """Whether there is another epoch after the one a step is in."""
        return (step * self._share.batch // self._order.items + 1) * self._order.items < self._share.total

    def _fetch(self, part: Range, first: _Step) -> None:
        """Read a range and tell the steps that wait for it."""
        try:
            damaged, size = self._reader.fetch(part, self._wanted_again(first.step))
        except BaseException as error:
            with self._lock:
                for piece in part.pieces:
                    for target in piece.targets:
                        target.owner[0].fail(error)
            return
        with self._lock:
            first.bytes += size
            for piece in part.pieces:
                for step, row in (target.owner for target in piece.targets):
                    step.checksums[row] += piece.crc
                    if piece.offset in damaged:
                        self._found(step, row, damaged[piece.offset])
                    step.coming -= 1
                    if not step.coming and not step.read.done():
                        step.read.set_result(None)

    def _found(self, step: _Step, row: int, error: CorruptData) -> None:
        """An item is damaged."""
        if self._quarantine is None:
            step.fail(error)
        else:
            step.corrupt[row] = Bad(step.items[row], step.positions[row], str(error))

    def _finished(self, step: _Step) -> Batch:
        """The batch of a step, when everything of it has come."""
        step.read.result()
        assert step.drawn is not None
        rows = len(step.items)
        weight = torch.ones(rows)
        for row, (item, position) in enumerate(zip(step.items, step.positions, strict=True)):
            if row in step.corrupt or (self._quarantine and self._quarantine.holds(item, position)):
                self._blank(step, row)
                weight[row] = 0
        read = {name: tensor[:rows] for name, tensor in step.tensors.items()}
        tensors = read | step.drawn.result() | {"weight": weight}
        ledger = sum(checksum for checksum, counts in zip(step.checksums, weight.tolist(), strict=True) if counts)
        return Batch(step.step, step.positions, step.items, tensors, ledger, step.bytes, tuple(step.corrupt.values()))

    def _blank(self, step: _Step, row: int) -> None:
        for tensor in step.tensors.values():
            tensor[row] = 0

    def _draw_ahead(self, step: _Step) -> None:
        if step.drawn is None:
            step.drawn = self._drawer.submit(self._draw, step.positions)

    def _draw(self, positions: range) -> dict[str, torch.Tensor]:
        """The random arrays of a share, with a leading axis of items; of an empty one too."""
        drawn = [self._stage.draw(self._seed, position) for position in positions] or [self._stage.draw(self._seed, 0)]
        stacked = {name: torch.from_numpy(np.stack([arrays[name] for arrays in drawn])[: len(positions)]) for name in drawn[0]}
        return {name: tensor.pin_memory() for name, tensor in stacked.items()} if self._pin else stacked


class _Memory:
    """Memory of batches: what nobody holds any more is used again, since the kernel gives out new pages slowly."""

    def __init__(self, pin: bool):
        self._pin = pin
        self._free: dict[tuple[tuple[int, ...], np.dtype], deque[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        """A tensor of any content."""
        if self._pin:  # torch uses pinned memory again itself, and knows when a copy to the GPU is done with it
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        free = self._free.setdefault((shape, dtype), deque())
        base = free.pop() if free else np.empty(shape, dtype)
        view = base[:]
        weakref.finalize(view, free.append, base).atexit = False
        return torch.from_numpy(view)
