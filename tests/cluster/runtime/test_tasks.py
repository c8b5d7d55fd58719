"""What tasks share is made once in a process, whatever the number of calls."""

import os
from collections import Counter
from functools import cached_property

import pytest

from cluster.config.schema import Workers
from cluster.runtime.tasks import map_tasks

CALLS = 40


class Shared:
    """Counts how often it was unpickled in this process, and keeps what it makes."""

    unpickled = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        Shared.unpickled += 1

    @cached_property
    def made(self) -> list[int]:
        return []


def note(shared: Shared, number: int) -> tuple[int, int, int]:
    """This process, how often it unpickled what is shared, and the calls it answered with it."""
    shared.made.append(number)
    return os.getpid(), Shared.unpickled, len(shared.made)


@pytest.mark.usefixtures("local_ray")
def test_a_process_takes_what_is_shared_once_and_anew_for_the_next_piece_of_work() -> None:
    for times in (1, 2):
        results = dict(map_tasks(note, [(number,) for number in range(CALLS)], Workers(), Shared()))
        assert sorted(results) == list(range(CALLS))
        processes = Counter(process for process, _, _ in results.values())
        for process, calls in processes.items():
            mine = [(unpickled, answered) for other, unpickled, answered in results.values() if other == process]
            assert max(answered for _, answered in mine) == calls and len({unpickled for unpickled, _ in mine}) == 1
            assert mine[0][0] <= times
        assert max(processes.values()) > 1, "some process answered more than one call"


def refuse(shared: str, number: int) -> None:
    raise KeyError(shared, number)


@pytest.mark.usefixtures("local_ray")
def test_the_error_of_a_call_is_raised_as_it_was() -> None:
    with pytest.raises(KeyError, match="why"):
        list(map_tasks(refuse, [(0,)], Workers(), "why"))
