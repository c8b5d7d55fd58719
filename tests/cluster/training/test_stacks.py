"""Where a rank is, told by a thread of its own."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from cluster.training.stacks import in_collective, stacks
from tests.cluster.support.ranks import on_ranks


def late(rank: int, ranks: int) -> tuple[bool, bool, bool, str]:
    """Whether this rank was seen in a collective before it, while one of them is late, and after it; and where it was meanwhile."""
    before, came, seen, where = in_collective(), threading.Event(), [False], [""]

    def look() -> None:
        while not came.is_set() and not seen[0]:
            seen[0] = in_collective()
            where[0] = stacks()
            time.sleep(0.01)

    watching = threading.Thread(target=look)
    watching.start()
    if rank == 1:
        time.sleep(1)
        came.set()
        watching.join()
    dist.all_reduce(torch.ones(1))
    came.set()
    watching.join()
    return before, seen[0], in_collective(), where[0]


@pytest.mark.starts
def test_a_rank_that_waits_for_another_one_is_in_a_collective_and_the_other_is_not() -> None:
    first, second = on_ranks(2, late)
    assert first[:3] == (False, True, False) and second[:3] == (False, False, False)
    assert "all_reduce" in first[3] and "in late" in first[3]
