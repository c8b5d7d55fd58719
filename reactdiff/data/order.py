"""Which item comes when: the item at any position is a pure function of (version, seed, position).

One epoch visits every item once. Items are grouped in *blocks* of neighbours that never cross a shard, so that a block is
read in one go. An epoch is a keyed permutation of the blocks, cut into *groups*; inside a group the items are permuted
again. The last, shorter stretch of a shard counts as blocks of one item. All of it is integer arithmetic on the shard's
item counts: nothing is shuffled in memory, and a position of a dataset of 10^8 items costs microseconds and tables of 200 KB.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from reactdiff.data.keyed import seed_of

VERSION = 1
ROUNDS = 6

TABLES = 64
"""Permutations whose round functions are kept: those of some groups, and of the blocks and single items of the epoch."""


class Order:
    """The infinite order of items over shards.

    Args:
        counts: items of each shard, in the dataset's order.
        seed: the run's seed.
        block: items read side by side.
        group: blocks whose items are mixed with each other.
        version: version of this rule.

    Raises:
        ValueError: for an unknown version, an empty dataset or a non-positive block or group.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, block: int, group: int, version: int = VERSION):
        if version != VERSION:
            raise ValueError(f"order version {version} is unknown; this program knows {VERSION}: use the release that started the run")
        if block < 1 or group < 1:
            raise ValueError(f"block is {block} and group is {group}, but both must be at least 1")
        sizes = np.asarray(counts, dtype=np.int64)
        if sizes.size == 0 or sizes.min() < 0 or sizes.sum() == 0:
            raise ValueError("the order needs at least one item, and no shard may have a negative count")
        self.seed, self.block = seed, block
        self._first = np.concatenate(([0], np.cumsum(sizes)))  # first item of each shard
        self._full = np.concatenate(([0], np.cumsum(sizes // block)))  # full blocks before each shard
        self._rest = np.concatenate(([0], np.cumsum(sizes % block)))  # single-item blocks before each shard
        self.items = int(self._first[-1])
        self._blocks, self._singles = int(self._full[-1]), int(self._rest[-1])
        self._groups = max(1, -(-self.items // (block * group)))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The items at these positions.

        Args:
            positions: (n,) int64, any positions of the infinite order.

        Returns:
            (n,) int64 item indices in [0, items).
        """
        positions = np.asarray(positions, dtype=np.int64)
        items = np.empty_like(positions)
        epochs = positions // self.items
        for epoch in np.unique(epochs):
            here = epochs == epoch
            items[here] = self._in_epoch(int(epoch), positions[here] % self.items)
        return items

    def begin(self, position: int) -> int:
        """The first position of the group that a position lies in."""
        epoch, offset = divmod(position, self.items)
        return epoch * self.items + int(self._start(self._group_of(np.array([offset]))[0]))

    def _in_epoch(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        group = self._group_of(offsets)
        place = np.empty_like(offsets)
        for g in np.unique(group).tolist():
            here = group == g
            start, size = self._start(g), self._start(g + 1) - self._start(g)
            place[here] = permute(offsets[here] - start, size, seed_of("order", self.seed, epoch, "items", g))
        return self._item(epoch, group, place)

    def _start(self, group: Any) -> Any:
        """The first offset of a group: every group gets its even share of full blocks and of single items."""
        return self.block * (group * self._blocks // self._groups) + group * self._singles // self._groups

    def _group_of(self, offsets: np.ndarray) -> np.ndarray:
        guess = np.minimum(offsets * self._groups // self.items, self._groups - 1)
        while (low := self._start(guess) > offsets).any():
            guess = guess - low
        while (high := self._start(guess + 1) <= offsets).any():
            guess = guess + high
        return guess

    def _item(self, epoch: int, group: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The item at each place of its group: first the group's full blocks, then its single items."""
        first_block, end_block = group * self._blocks // self._groups, (group + 1) * self._blocks // self._groups
        in_blocks = self.block * (end_block - first_block)
        items = np.empty_like(place)
        full = place < in_blocks
        if full.any():
            order = first_block[full] + place[full] // self.block
            which = permute(order, self._blocks, seed_of("order", self.seed, epoch, "blocks"))
            shard = np.searchsorted(self._full, which, side="right") - 1
            items[full] = self._first[shard] + (which - self._full[shard]) * self.block + place[full] % self.block
        if not full.all():
            order = (group * self._singles // self._groups + place - in_blocks)[~full]
            which = permute(order, self._singles, seed_of("order", self.seed, epoch, "singles"))
            shard = np.searchsorted(self._rest, which, side="right") - 1
            items[~full] = self._first[shard + 1] - (self._rest[shard + 1] - which)
        return items


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of range(size), applied to some of its values.

    A balanced Feistel network on the next power of four, walked along its cycles until it lands in range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        values: (n,) int64 in [0, size).
        size: of the permuted range.
        key: any integer of up to 128 bits.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    rounds, mask = _rounds(half, key), (1 << half) - 1
    walk = values.astype(np.int64)
    outside = np.arange(len(walk))
    while outside.size:
        left, right = walk[outside] >> half, walk[outside] & mask
        for table in rounds:
            left, right = right, left ^ table[right]
        walk[outside] = landed = (left << half) | right
        outside = outside[landed >= size]
    return walk


@lru_cache(maxsize=TABLES)
def _rounds(half: int, key: int) -> np.ndarray:
    """The round functions of a network whose halves have so many bits, (rounds, 2 ** half) int64, as tables: 200 KB for 10^7 values."""
    low, high = key % 2**64, key >> 64
    keys = [np.uint64((low + (r + 1) * (high | 1) * 0x9E3779B97F4A7C15) % 2**64) for r in range(ROUNDS)]
    halves = np.arange(1 << half, dtype=np.uint64)
    mask = np.uint64((1 << half) - 1)
    return np.stack([(_mix(halves + key) & mask).astype(np.int64) for key in keys])


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele et al., 2014): every output bit depends on every input bit. uint64, modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def step_slice(step: int, batch: int, total: int, ranks: int, rank: int) -> range:
    """The positions of a step that one rank computes: contiguous, uneven or empty where they must be.

    Args:
        step: optimiser step, from 0; it covers positions [step * batch, (step + 1) * batch), cut at `total`.
        batch: items of a step over all ranks.
        total: positions of the whole run.
        ranks: number of ranks.
        rank: this one.
    """
    start, end = step * batch, min((step + 1) * batch, total)
    size = max(0, end - start)
    return range(start + rank * size // ranks, start + (rank + 1) * size // ranks)
