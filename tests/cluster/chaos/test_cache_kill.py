"""Processes that fill, read, drop and evict in one cache are killed at any time: nobody reads wrong bytes, the limit holds."""

import fcntl
import random
import signal
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.data.cache import Cache
from tests.cluster.data.test_cache import MB, counted, disk_space, fill, kept, process, tar_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROUNDS = 25
LIMIT = 6 * MB

VICTIM = """
cache, draw = Cache(folder, int(sys.argv[2])), random.Random(int(sys.argv[3]))
tars = [tar_of(draw.randrange(12)) for _ in range(3)]
cache.use(tars)
print("ready", flush=True)
while True:
    tar, number = draw.choice(tars), draw.randrange(40)
    start, length = number * SIZE, SIZE - 37 * number
    if (here := read(cache, tar, start, length)) is None:
        admit(cache, tar, start, length)
    elif here != content(tar, start, length):
        sys.exit("wrong bytes")
    elif draw.random() < 0.2:
        cache.drop(tar, start, length)
"""


def test_one_after_the_other_is_killed(tmp_path: Path) -> None:
    folder, draw = tmp_path / "cache", random.Random(0)
    with ExitStack() as stack:
        living: deque = deque()
        for number in range(ROUNDS):
            living.append(stack.enter_context(process(VICTIM, folder, LIMIT, number)))
            assert living[-1].stdout.readline() == "ready\n"
            if len(living) > 3:
                time.sleep(draw.random() * 0.05)
                living.rotate(draw.randrange(4))
                victim = living.popleft()
                victim.kill()
                assert victim.wait() == -signal.SIGKILL, victim.stderr.read()
            with open(folder / "count", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                used, settled = counted(folder)
                assert disk_space(folder) <= used <= LIMIT or not settled
                assert disk_space(folder) <= LIMIT
        assert all(other.poll() is None for other in living), "the others live"
    cache = Cache(folder, LIMIT)
    cache.use([tar_of(99)])
    assert fill(cache, tar_of(99), 100) == 100, "the dead make room"
    assert kept(cache, tar_of(99), 100) == 100
    assert counted(folder) == (disk_space(folder), True)
