"""Order -> ranged reads -> verified, decoded batches on this rank.

Every rank has every step; which of its positions a rank reads is a pure function of (step, ranks, rank). Threads read ahead,
but hand over in order. Every member is checked against its CRC32C before it becomes part of a batch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cluster.reader import Reader
from reactdiff.data.order import Order, step_slice
from reactdiff.stage import Stage


@dataclass(frozen=True)
class Item:
    """One decoded item: arrays by batch name, the bytes read for it and the sum of its members' CRC32C."""

    arrays: dict[str, np.ndarray]
    bytes: int
    checksum: int


@dataclass(frozen=True)
class Batch:
    """This rank's share of one step.

    Attributes:
        step: which step.
        positions: in the order of items.
        items: the items at these positions.
        tensors: name -> (items, ...) tensor, and `weight` (items,): 0 for a quarantined item, else 1.
        ledger: sum of the CRC32C of all member bytes the share consists of.
        bytes: read for it.
    """

    step: int
    positions: range
    items: list[int]
    tensors: dict[str, torch.Tensor]
    ledger: int
    bytes: int

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


class Stream:
    """Batches of one split, in order, from any step on.

    Args:
        reader: reads clips of the split.
        stage: says what an item reads and draws.
        order: which item is at a position.
        share: which positions of a step are read here.
        seed: keys the random arrays.
        read_ahead: steps read before they are asked for.
        readers: threads that read and decode.
    """

    def __init__(self, reader: Reader, stage: Stage, order: Order, share: Share, seed: int, read_ahead: int, readers: int):
        self._reader, self._stage, self._order, self._share = reader, stage, order, share
        self._seed, self._read_ahead = seed, read_ahead
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")

    def batches(self, first_step: int) -> Iterator[Batch]:
        """All steps from `first_step` to the end of the run; an empty share still gives a batch.

        Raises:
            CorruptData: if a member's bytes are not those of its index.
            StorageError: if they cannot be read.
        """
        ahead: deque[tuple[int, list[int], list[Future[Item]]]] = deque()
        step = first_step
        try:
            while step < self._share.steps or ahead:
                while step < self._share.steps and len(ahead) <= self._read_ahead:
                    positions = self._share.positions(step)
                    items = [int(item) for item in self._order.at(np.arange(positions.start, positions.stop))]
                    ahead.append((step, items, [self._pool.submit(self._read, i, p) for i, p in zip(items, positions, strict=True)]))
                    step += 1
                yield self._collate(*ahead.popleft())
        finally:
            for _, _, futures in ahead:
                for future in futures:
                    future.cancel()

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, item: int, position: int) -> Item:
        clip, side = divmod(item, 2)
        wanted = self._stage.reads(side)
        found = self._reader.read(clip, sorted(set(wanted.values())))
        arrays = {name: found.arrays[source] for name, source in wanted.items()}
        return Item(arrays | self._stage.draw(self._seed, position), found.bytes, found.checksum)

    def _collate(self, step: int, items: list[int], futures: list[Future[Item]]) -> Batch:
        read = [future.result() for future in futures]
        if read:
            tensors = {name: torch.from_numpy(np.stack([item.arrays[name] for item in read])) for name in read[0].arrays}
        else:
            tensors = {name: torch.from_numpy(array[:0]) for name, array in self._template.items()}
        tensors["weight"] = torch.ones(len(read))
        return Batch(step, self._share.positions(step), items, tensors, sum(i.checksum for i in read), sum(i.bytes for i in read))

    @cached_property
    def _template(self) -> dict[str, np.ndarray]:
        """The first item with a leading axis, to give an empty share its shapes."""
        return {name: array[None] for name, array in self._read(0, 0).arrays.items()}
