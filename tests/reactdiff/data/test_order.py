"""The order of items: exactly once per epoch, the same for any ranks, a pure function that never changes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactdiff.data.order import Order, permute, step_slice

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
orders = st.builds(Order, counts, seed=st.integers(0, 2**40), block=st.integers(1, 9), group=st.integers(1, 6))


@given(orders, st.integers(0, 5))
def test_each_item_comes_exactly_once_in_every_epoch(order: Order, epoch: int) -> None:
    items = order.at(np.arange(epoch * order.items, (epoch + 1) * order.items))
    assert np.array_equal(np.sort(items), np.arange(order.items))


@given(orders, st.integers(1, 17), st.integers(1, 7), st.floats(0.1, 3), st.data())
def test_any_number_of_ranks_and_any_resume_point_give_the_same_sequence(order, batch, ranks, epochs, data) -> None:
    total = max(1, int(epochs * order.items))
    steps = -(-total // batch)
    change = data.draw(st.integers(0, steps))
    later_ranks = data.draw(st.integers(1, 7))
    seen = []
    for step in range(steps):
        now = ranks if step < change else later_ranks
        for rank in range(now):
            seen.extend(step_slice(step, batch, total, now, rank))
    assert seen == list(range(total))
    assert np.array_equal(order.at(np.array(seen)), order.at(np.arange(total)))


@given(st.integers(1, 5000), st.integers(0, 2**128 - 1))
def test_a_permutation_is_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(counts, st.integers(2, 9))
def test_a_block_is_read_from_one_shard(sizes: list[int], block: int) -> None:
    order = Order(sizes, seed=1, block=block, group=1)
    first = np.concatenate(([0], np.cumsum(sizes)))
    full_blocks = sum(size // block for size in sizes)
    items = order.at(np.arange(order.items))
    shard, place = np.searchsorted(first, items, side="right") - 1, items - first[np.searchsorted(first, items, side="right") - 1]
    blocks = {(s, p // block) for s, p in zip(shard, place, strict=True) if p < sizes[s] // block * block}
    assert len(blocks) == full_blocks


@given(counts, st.integers(1, 9), st.integers(0, 3))
def test_a_group_begins_where_its_blocks_do(sizes: list[int], block: int, epoch: int) -> None:
    """Whatever of a block comes after the position where a group begins, all of it does."""
    order = Order(sizes, seed=1, block=block, group=2)
    positions = np.arange(epoch * order.items, (epoch + 1) * order.items)
    begins = [order.begin(int(position)) for position in positions]
    assert begins == sorted(begins) and begins[0] == positions[0] and all(order.begin(begin) == begin for begin in set(begins))
    first = np.concatenate(([0], np.cumsum(sizes)))
    items = order.at(positions)
    shard = np.searchsorted(first, items, side="right") - 1
    place = items - first[shard]
    groups: dict[tuple[int, int], set[int]] = {}
    for begin, s, p in zip(begins, shard.tolist(), place.tolist(), strict=True):
        if p < sizes[s] // block * block:
            groups.setdefault((s, p // block), set()).add(begin)
    assert all(len(begin) == 1 for begin in groups.values())
    assert len(set(begins)) == max(1, -(-order.items // (2 * order.block)))


def test_epochs_and_seeds_differ_and_neighbours_are_spread() -> None:
    order, other = (Order([400], seed=seed, block=4, group=200) for seed in (0, 1))
    first = order.at(np.arange(400))
    assert not np.array_equal(first, order.at(np.arange(400, 800)))
    assert not np.array_equal(first, other.at(np.arange(400)))
    assert abs(np.corrcoef(np.arange(400), first)[0, 1]) < 0.2


def test_version_1_never_changes() -> None:
    """Golden values: a run started with version 1 must find its items again for ever."""
    order = Order([13, 1, 30, 0, 7], seed=42, block=4, group=3)
    assert order.at(np.arange(12)).tolist() == [17, 41, 16, 39, 43, 40, 14, 15, 38, 24, 13, 23]
    assert order.at(np.array([10**9])).tolist() == [46]
    large = Order(np.full(1000, 10**5 + 7), seed=42, block=64, group=16)
    assert large.at(np.array([0, 1, 2, 10**8 - 1, 12345678901])).tolist() == [92068200, 50749058, 50749061, 54773887, 14063028]


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="order version 2 is unknown"):
        Order([1], seed=0, block=1, group=1, version=2)


def test_a_hundred_million_items_need_no_list() -> None:
    order = Order(np.full(100_000, 1000), seed=1, block=64, group=16)
    items = order.at(np.arange(10**8 - 16, 10**8))
    assert len(set(items.tolist())) == 16 and items.max() < 10**8


def test_a_rank_of_a_thousand_finds_its_positions_in_a_megabyte() -> None:
    """What a step costs, beyond the order itself, does not depend on how many items there are; nor does the order."""
    small, large = (Order(np.full(100_000, clips), seed=1, block=64, group=16) for clips in (10, 1000))
    arrays = [[value.size for value in vars(order).values() if isinstance(value, np.ndarray)] for order in (small, large)]
    assert arrays[0] == arrays[1] and max(arrays[1]) == 100_001
    peaks = []
    for step in (0, 777, 10**8 // 64_000):  # the last one straddles two epochs
        tracemalloc.start()
        share = step_slice(step, batch=64_000, total=10**9, ranks=1000, rank=999 if step else 500)
        items = large.at(np.arange(share.start, share.stop))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(items.tolist())) == 64
    assert max(peaks) < 1 << 20, peaks
