"""Order -> ranged reads -> verified, decoded batches on this rank.

Every rank has every step; which of its positions a rank reads is a pure function of (step, ranks, rank). A window of steps is
read ahead of the one that is asked for, as large as memory allows: items that are neighbours in a shard come in one read, whichever
steps they are for, and arrays are received in the tensors of their batches. Several threads read; the order of batches does not
depend on which of them is first.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from threading import Condition, Event

import numpy as np
import torch

from cluster.data.other_targets import OtherTargets
from cluster.data.quarantine import BadItem, Quarantine
from cluster.data.ranges import Range, ReadPlan
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData
from cluster.storage.retry import cancel_retries_on
from reactdiff.data.order import Order, step_slice
from reactdiff.stage import Stage

DRAW_AHEAD = 2
"""Steps whose random arrays are drawn ahead: they are larger than what is read, and quickly made."""

WINDOWS = 3
"""Most windows that are held: one that is read, one that is handed out, and one whose last batch is still in use."""


def steps_ahead(step_bytes: int, read_ahead: int) -> int:
    """Steps of a window, as many as WINDOWS of them have room for in so many bytes."""
    return max(1, read_ahead // (WINDOWS * step_bytes))


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step.

    Attributes:
        step: which step.
        positions: in the order of items.
        items: the items at these positions.
        tensors: name -> (items, ...) tensor, and `weight` (items,): 0 for a quarantined item, else 1. Their memory is used
            again once nothing refers to them.
        checksums: of each item, the sum of the CRC32C of all member bytes it consists of; 0 of a quarantined one.
        bytes: read for it, and for later steps along with it.
        corrupt: items whose bytes are damaged: of it, or of those whose targets it has.
        targets: the item whose target each has; its own, but for `OtherTargets`.
    """

    step: int
    positions: range
    items: list[int]
    tensors: dict[str, torch.Tensor]
    checksums: np.ndarray
    bytes: int
    corrupt: tuple[BadItem, ...] = ()
    targets: tuple[int, ...] = ()

    @property
    def ledger(self) -> int:
        """Sum of the CRC32C of all member bytes the share consists of."""
        return int(self.checksums.sum())

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
    """Which part of every step is this rank's.

    Attributes:
        batch: items of a step.
        total: items of the whole run.
        ranks: how many share a step.
        rank: which of them this is.
    """

    batch: int
    total: int
    ranks: int
    rank: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.total // self.batch)

    def bounds(self, step: int) -> tuple[int, int]:
        """Progress before and after a step, in items."""
        return step * self.batch, min((step + 1) * self.batch, self.total)

    def positions(self, step: int) -> range:
        """This rank's positions of a step."""
        return step_slice(step, self.batch, self.total, self.ranks, self.rank)


class _Step:
    """A step that is being read.

    Attributes:
        number: which step.
        positions: of this rank's share.
        rows: of the window's tensors.
        pending: arrays that have not been read yet.
        bytes: read so far for ranges of which it is the earliest step.
        error: what kept something of it from being read.
        random: its random arrays, once they are asked for.
    """

    def __init__(self, number: int, positions: range, rows: slice):
        self.number, self.positions, self.rows = number, positions, rows
        self.pending = 0
        self.bytes = 0
        self.error: BaseException | None = None
        self.random: Future[dict[str, torch.Tensor]] | None = None

    def done(self) -> bool:
        """Whether all of it has been read, or something cannot be."""
        return self.error is not None or not self.pending


class _ReadAhead:
    """Steps that are read together: their items, whose targets these have, and tensors with a row for each."""

    def __init__(self, steps: list[_Step], items: np.ndarray, targets: np.ndarray, tensors: dict[str, torch.Tensor]):
        self.steps, self.items, self.targets, self.tensors = steps, items, targets, tensors
        self.step_of = [step for step in steps for _ in step.positions]
        self.checksums = np.zeros(len(items), dtype=np.int64)
        self.corrupt: dict[int, BadItem] = {}


class Stream:
    """Batches of one split, in order, from any step on.

    Args:
        reader: reads clips of the split.
        stage: says what an item reads and draws.
        order: which item is at a position.
        share: which positions of a step are read here.
        seed: keys the random arrays.
        read_ahead: bytes of memory for what is read before it is asked for; at least three steps' worth is used.
        readers: threads that read and decode.
        pin: whether the tensors are in pinned memory, which is copied to a GPU asynchronously.
        quarantine: items that do not count; without one damaged data is an error.
        others: whose targets items have, where these need not be their own.
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
        others: OtherTargets | None = None,
    ):
        self._reader, self._stage, self._order, self._share = reader, stage, order, share
        self._seed, self._pin, self._quarantine, self._others = seed, pin, quarantine, others
        sides = [stage.reads(side) for side in (0, 1)]
        self._kinds = {name: reader.array(source) for name, source in sides[0].items()}
        self._members = np.array([[reader.member(side[name]) for name in self._kinds] for side in sides], dtype=np.int64)
        self._borrowed = [name for name in self._kinds if others is not None and name in others.names]
        self._own = [name for name in self._kinds if name not in self._borrowed]
        self._draws = bool(stage.draw(seed, 0))
        item_bytes = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._kinds.values())
        rows = -(-share.batch // share.ranks)
        self._window = min(steps_ahead(item_bytes * rows, read_ahead), share.steps)
        self._memory = _BufferPool(self._window * rows, pin)
        self._closing = Event()
        self._pool, self._indices, self._planner, self._drawer = (
            ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=cancel_retries_on, initargs=(self._closing,))
            for name, threads in {"reader": readers, "index": readers, "planner": 1, "drawer": 1}.items()
        )
        self._changed = Condition()  # guards all steps; notified when the one that is waited for is done
        self._waited_for: _Step | None = None

    def batches(self, first_step: int) -> Iterator[Batch]:
        """All steps from `first_step` to the end of the run; an empty share still gives a batch.

        Raises:
            CorruptData: if a member's bytes are not those of its index, and there is no quarantine.
            StorageError: if they cannot be read.
        """
        size, begin = 1, first_step  # the first windows are small, so that the first batch is there soon
        next_window = self._planner.submit(self._plan, begin, size)
        while (window := next_window.result()).steps:
            begin, size = begin + len(window.steps), min(2 * size, self._window)
            next_window = self._planner.submit(self._plan, begin, size)
            for place, step in enumerate(window.steps):
                self._draw_ahead(window.steps[place : place + 1 + DRAW_AHEAD])
                yield self._wait_for_batch(window, step)

    def mask(self, batch: Batch) -> None:
        """Let what is in the quarantine by now count nothing in a batch, in place; so it is in what is handed out from here on."""
        assert self._quarantine is not None
        self._blank(batch, (row for row, at in enumerate(batch.positions) if self._left_out(batch.items[row], batch.targets[row], at)))

    def _left_out(self, item: int, target: int, position: int) -> bool:
        """Whether an item counts nothing there: an item with another's target does where that one does not, and is not lost for it."""
        assert self._quarantine is not None
        return self._quarantine.holds(item, position) or self._quarantine.holds(target, position)

    def close(self) -> None:
        """Stop the readers; one that waits before a retry gives up."""
        self._closing.set()
        for pool in (self._planner, self._drawer, self._indices, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, first: int, count: int) -> _ReadAhead:
        """Plan the reads of these steps and begin with them."""
        window = self._new_window(range(first, self._end(first, count)))
        self._draw_ahead(window.steps[: 1 + DRAW_AHEAD])
        rows = np.arange(len(window.items))
        if self._quarantine:
            positions = (position for step in window.steps for position in step.positions)
            both = zip(window.items.tolist(), window.targets.tolist(), positions, strict=True)
            rows = rows[~np.array([self._left_out(*of_row) for of_row in both], dtype=bool)]
        if not len(rows):
            return window
        own = window.items[rows] == window.targets[rows]
        parts = ((rows[own], list(self._kinds), False), (rows[~own], self._own, False), (rows[~own], self._borrowed, True))
        plans = [self._read_plan(window, some, names, borrowed) for some, names, borrowed in parts if len(some)]
        for row in rows.tolist():
            window.step_of[row].pending += len(self._kinds)
        ranges = [(min(plan.row[span.first : span.last]), span, plan, of) for plan, of in plans for span in self._reader.ranges(plan)]
        for row, span, plan, of in sorted(ranges, key=itemgetter(0, 1)):  # in the order in which they will be needed
            self._pool.submit(self._fetch, window, plan, span, window.step_of[row], of)
        return window

    def _read_plan(self, window: _ReadAhead, rows: np.ndarray, names: list[str], borrowed: bool) -> tuple[ReadPlan, np.ndarray]:
        """Where these arrays of these rows are, which may be borrowed; and the item that each row of the window takes them from."""
        of = window.targets if borrowed else window.items
        clips, sides = np.divmod(of[rows], 2)
        columns = [place for place, name in enumerate(self._kinds) if name in names]
        places = [window.tensors[name].numpy() for name in names]
        plan = self._reader.plan(clips, self._members[sides][:, columns], places, rows, self._indices.map)
        np.add.at(window.checksums, plan.row, plan.crc)
        return plan, of

    def _end(self, first: int, count: int) -> int:
        """Where a window of at most so many steps ends: before a group that it has no room for, whose blocks would be read in pieces."""
        end = first + count
        if end >= self._share.steps:
            return self._share.steps
        whole = self._order.begin(end * self._share.batch) // self._share.batch
        return whole if whole > first else end

    def _new_window(self, numbers: range) -> _ReadAhead:
        """A window of these steps, of which nothing has been read."""
        shares = [self._share.positions(number) for number in numbers]
        ends = list(accumulate((len(share) for share in shares), initial=0))
        steps = [_Step(*step) for step in zip(numbers, shares, (slice(*pair) for pair in pairwise(ends)), strict=True)]
        positions = np.concatenate([np.arange(share.start, share.stop) for share in shares] or [np.empty(0, np.int64)])
        items = self._order.at(positions)
        targets = self._others.of(items, positions.tolist()) if self._others else items
        return _ReadAhead(steps, items, targets, {name: self._memory.take(len(items), *kind) for name, kind in self._kinds.items()})

    def _wanted_again(self, step: int) -> bool:
        """Whether there is another epoch after the one a step is in."""
        return (step * self._share.batch // self._order.items + 1) * self._order.items < self._share.total

    def _fetch(self, window: _ReadAhead, plan: ReadPlan, span: Range, first: _Step, of: np.ndarray) -> None:
        """Read a range and count it for its steps; `first` is the earliest of them, and `of` says which item each row's bytes are of."""
        rows = plan.row[span.first : span.last]
        try:
            damaged, size = self._reader.fetch(plan, span, self._wanted_again(first.number))
        except BaseException as failure:
            with self._changed:
                for row in rows:
                    window.step_of[row].error = failure
                self._notify()
            return
        with self._changed:
            first.bytes += size
            for number, error in damaged.items():
                self._mark_corrupt(window, plan.row[number], int(of[plan.row[number]]), error)
            for row in rows:
                window.step_of[row].pending -= 1
            self._notify()

    def _notify(self) -> None:
        """Wake `_wait_for_batch` if its step is done, and only then: a wake-up costs more than reading an item."""
        if self._waited_for and self._waited_for.done():
            self._changed.notify()

    def _mark_corrupt(self, window: _ReadAhead, row: int, item: int, error: CorruptData) -> None:
        """Note that an item is damaged which a row needs; without a quarantine that is an error of its step."""
        step = window.step_of[row]
        if self._quarantine is None:
            step.error = error
        else:
            bad = BadItem(item, step.positions[row - step.rows.start], str(error))
            window.corrupt[row] = min(window.corrupt.get(row, bad), bad)  # whichever thread was first

    def _wait_for_batch(self, window: _ReadAhead, step: _Step) -> Batch:
        """The batch of a step, once all of it has been read."""
        with self._changed:
            self._waited_for = step
            self._changed.wait_for(step.done)
        if step.error:
            raise step.error
        items = window.items[step.rows].tolist()
        tensors = {name: tensor[step.rows] for name, tensor in window.tensors.items()} | {"weight": torch.ones(len(items))}
        if step.random:
            tensors |= step.random.result()
        corrupt = {row: window.corrupt[at] for row, at in enumerate(range(step.rows.start, step.rows.stop)) if at in window.corrupt}
        checksums = window.checksums[step.rows]
        targets = tuple(window.targets[step.rows].tolist())
        batch = Batch(step.number, step.positions, items, tensors, checksums, step.bytes, tuple(corrupt.values()), targets)
        if self._quarantine is not None:
            self._blank(batch, corrupt)
            self.mask(batch)
        return batch

    def _blank(self, batch: Batch, rows: Iterable[int]) -> None:
        """Let these rows count nothing: what was read of them becomes zeros. What was drawn stays."""
        for row in rows:
            batch.tensors["weight"][row] = batch.checksums[row] = 0
            for name in self._kinds:
                batch.tensors[name][row] = 0

    def _draw_ahead(self, steps: list[_Step]) -> None:
        for step in steps:
            if self._draws and step.random is None:
                step.random = self._drawer.submit(self._draw, step.positions)

    def _draw(self, positions: range) -> dict[str, torch.Tensor]:
        """The random arrays of a share, with a leading axis of items; of an empty one too."""
        items = [self._stage.draw(self._seed, position) for position in positions] or [self._stage.draw(self._seed, 0)]
        stacked = {name: torch.from_numpy(np.stack([arrays[name] for arrays in items])[: len(positions)]) for name in items[0]}
        return {name: tensor.pin_memory() for name, tensor in stacked.items()} if self._pin else stacked


class _BufferPool:
    """Memory of windows: what nothing refers to any more is used again, since the kernel gives out new pages slowly.

    Args:
        rows: of the largest window. Memory costs nothing before it is written to, so the first windows have as much.
        pin: whether it is pinned memory, for asynchronous copies to a GPU.
    """

    def __init__(self, rows: int, pin: bool):
        self._rows, self._pin = rows, pin
        self._free: dict[tuple[tuple[int, ...], np.dtype], deque[np.ndarray]] = {}

    def take(self, rows: int, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        """A tensor of so many rows of this shape, with any content."""
        if self._pin:  # torch uses pinned memory again itself, and knows when a copy to the GPU is done with it
            return torch.empty((self._rows, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)[:rows]
        free = self._free.setdefault((shape, dtype), deque())
        base = free.popleft() if free else np.empty((self._rows, *shape), dtype)
        view = base[:rows]
        weakref.finalize(view, free.appendleft, base).atexit = False
        return torch.from_numpy(view)
