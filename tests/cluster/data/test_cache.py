"""What the cache of a node promises: right bytes or none, its limit, and no harm to other processes when one is killed."""

import fcntl
import inspect
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import shake_128
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data import cache as cache_module
from cluster.data import cache_space
from cluster.data.cache import HEAD, Cache
from tests.tiny import ROOT

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
SIZE = 24 * KB
"""Of the ranges that most tests admit, side by side."""


def tar_of(number: int) -> str:
    """A tar's hash."""
    return f"{number:032x}"


def content(tar: str, start: int, length: int) -> bytes:
    """What the tar has there: a pure function, so that every process knows it."""
    period = shake_128(tar.encode()).digest(4099)
    return (period * (length // 4099 + 2))[start % 4099 :][:length]


def admit(cache: Cache, tar: str, start: int, length: int) -> bool:
    return cache.admit(tar, start, memoryview(content(tar, start, length)))


def read(cache: Cache, tar: str, start: int, length: int) -> bytes | None:
    buffer = bytearray(length)
    return bytes(buffer) if cache.read_into(tar, start, memoryview(buffer)) else None


def descriptors(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.islink(link) and Path(os.readlink(link)).is_relative_to(folder) for link in links)


def fill(cache: Cache, tar: str, ranges: int) -> int:
    """How many of the tar's first ranges are kept."""
    return sum(admit(cache, tar, number * SIZE, SIZE) for number in range(ranges))


def kept(cache: Cache, tar: str, ranges: int) -> int:
    """How many of the tar's first ranges are in the cache, all of them right."""
    found = [(read(cache, tar, number * SIZE, SIZE), content(tar, number * SIZE, SIZE)) for number in range(ranges)]
    assert all(here in (None, right) for here, right in found)
    return sum(here is not None for here, _ in found)


def disk_space(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def counted(folder: Path) -> tuple[int, bool]:
    """The count of disk space that the processes keep, and whether it is up to date."""
    return cache_space.COUNT.unpack((folder / "count").read_bytes())


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """Another process of this node with the functions above; it is killed in the end if it still lives."""
    shared = "".join(map(inspect.getsource, (tar_of, content, admit, read, fill)))
    imports = "import logging, os, random, signal, sys; from hashlib import shake_128; from pathlib import Path"
    imports += "; from cluster.data.cache import Cache"
    code = f"{imports}\nKB, SIZE, HEAD = {KB}, {SIZE}, {HEAD}\n{shared}\nfolder = Path(sys.argv[1])\n{script}"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture(params=["disk", *(["memory"] if os.access("/dev/shm", os.W_OK) else [])])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a cache may be, on each kind of file system there is here."""
    with tempfile.TemporaryDirectory(dir=tmp_path if request.param == "disk" else "/dev/shm") as root:
        yield Path(root) / "cache"


@pytest.mark.starts
def test_what_was_admitted_is_read_by_every_process_and_run(folder: Path) -> None:
    cache, tar = Cache(folder, MB), tar_of(1)
    data = content(tar, 1024, 5000)
    assert cache.admit(tar, 1024, memoryview(data)[:17], memoryview(data)[17:17], memoryview(data)[17:])
    for reader in (cache, Cache(folder, MB)):
        first, second = bytearray(3000), bytearray(2010)
        assert reader.read_into(tar, 1024, memoryview(first), memoryview(second)[10:])
        assert first + second == data[:3000] + bytes(10) + data[3000:]
    with process("print(read(Cache(folder, KB), tar_of(1), 1024, 5000) == content(tar_of(1), 1024, 5000))", folder) as other:
        assert other.stdout.read() == "True\n"


def test_a_range_is_there_only_if_all_of_it_was_admitted(folder: Path) -> None:
    cache, tar = Cache(folder, MB), tar_of(1)
    assert not cache.holds(tar, 0, 512) and read(cache, tar, 0, 512) is None
    assert not list(folder.glob("0*")), "asking creates nothing"
    assert admit(cache, tar, 0, 5000)
    assert cache.holds(tar, 0, 5000) and cache.holds(tar, 512, 1000)
    assert not cache.holds(tar, 0, 5121), "one byte more than the members that were admitted"
    assert not cache.holds(tar, 5120, 1000), "in the same page of the disk, but never admitted"
    assert read(cache, tar, 4096, 2000) is None
    assert admit(cache, tar, 5120, 1000)
    assert read(cache, tar, 5120, 1000) == content(tar, 5120, 1000)
    assert not cache.holds(tar_of(2), 0, 512)


def test_more_buffers_than_one_system_call_takes(folder: Path) -> None:
    cache, tar = Cache(folder, 4 * MB), tar_of(1)
    data, copy = content(tar, 0, 2500 * 512), bytearray(2500 * 512)
    assert cache.admit(tar, 0, *(memoryview(data)[start : start + 512] for start in range(0, len(data), 512)))
    assert cache.read_into(tar, 0, *(memoryview(copy)[start : start + 1000] for start in range(0, len(data), 1000)))
    assert copy == data


def test_large_tars(folder: Path) -> None:
    cache, tar = Cache(folder, MB), tar_of(1)
    assert admit(cache, tar, 900 * GB, 5000)
    assert read(cache, tar, 900 * GB, 5000) == content(tar, 900 * GB, 5000)
    assert cache.admit(tar, 0, memoryview(b"\1" * 5000))
    assert not cache.holds(tar, 1024 * GB, 512), "the tar's own bytes are no map"
    assert not admit(cache, tar, 1024 * GB, 5000)
    assert disk_space(folder) < 64 * KB


def test_the_folder_is_private_and_a_tar_cannot_lead_out_of_it(folder: Path) -> None:
    cache = Cache(folder, MB)
    assert admit(cache, tar_of(1), 0, 512)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=r"'\.\./escape' is no content hash of a tar"):
        admit(cache, "../escape", 0, 512)


MEMBERS = st.lists(st.integers(1, 3000), min_size=3, max_size=8)
ACTIONS = st.lists(st.tuples(st.sampled_from(["admit", "drop"]), st.integers(0, 7), st.integers(0, 7)), max_size=12)


@settings(max_examples=60)
@given(sizes=MEMBERS, actions=ACTIONS)
def test_it_holds_what_was_admitted_and_not_dropped_and_nothing_else(sizes: list[int], actions: list[tuple[str, int, int]]) -> None:
    offsets, tar, data = [], tar_of(1), b""
    for size in sizes:
        data += b"H" * 512
        offsets.append(len(data))
        data += random.Random(size).randbytes(size) + bytes(-size % 512)
    ranges = {
        (i, j): (offsets[i], offsets[j] + sizes[j] - offsets[i], set(range(offsets[i] // 512, (offsets[j] + sizes[j] + 511) // 512)))
        for j in range(len(sizes))
        for i in range(j + 1)
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, model = Cache(Path(folder), MB), set[int]()
        for action, one, other in actions:
            i, j = sorted((one % len(sizes), other % len(sizes)))
            start, length, units = ranges[i, j]
            if action == "admit":
                assert cache.admit(tar, start, memoryview(data)[start : start + length])
                model |= units
            elif units <= model:
                cache.drop(tar, start, length)
                model -= units
        for start, length, units in ranges.values():
            assert cache.holds(tar, start, length) == (units <= model)
            assert read(cache, tar, start, length) == (data[start : start + length] if units <= model else None)


def test_threads_read_the_right_bytes_while_files_are_closed_and_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FILES", 2)
    cache = Cache(folder, 16 * MB)
    before = descriptors(folder)

    def work(thread: int) -> int:
        found = 0
        for turn in range(150):
            tar, start = tar_of((thread + turn) % 7), turn % 10 * SIZE
            if (here := read(cache, tar, start, SIZE)) is not None:
                assert here == content(tar, start, SIZE)
                found += 1
            else:
                assert admit(cache, tar, start, SIZE)
        return found

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) >= 6 * 150 - 6 * 70
    assert descriptors(folder) <= before + 2
    assert counted(folder) == (disk_space(folder), True)


@pytest.mark.starts
def test_four_processes_that_admit_at_the_same_time_stay_within_the_limit(folder: Path) -> None:
    script = """
cache = Cache(folder, int(sys.argv[2]))
cache.use(map(tar_of, range(8)))
places = [(tar_of(tar), number * SIZE) for tar in range(8) for number in range(60)]
random.Random(sys.argv[3]).shuffle(places)
print("ready", flush=True)
sys.stdin.readline()
print(sum(admit(cache, tar, start, SIZE) for tar, start in places))
"""
    limit, wanted = 4 * MB, 8 * 60 * SIZE
    with process(script, folder, limit, 1) as a, process(script, folder, limit, 2) as b:
        with process(script, folder, limit, 3) as c, process(script, folder, limit, 4) as d:
            assert [other.stdout.readline() for other in (a, b, c, d)] == ["ready\n"] * 4
            for other in (a, b, c, d):
                print(file=other.stdin, flush=True)
            assert all(0 < int(other.stdout.read()) < 8 * 60 for other in (a, b, c, d)), "each kept some, none all"
    assert 0.95 * limit < disk_space(folder) <= limit < wanted
    assert counted(folder) == (disk_space(folder), True)
    assert sum(kept(Cache(folder, limit), tar_of(tar), 60) for tar in range(8)) > 0.9 * limit / SIZE


KILLED = """
cache, tar = Cache(folder, int(sys.argv[2])), tar_of(1)
cache.use([tar])
moment, calls = int(sys.argv[3]), 0

def fatal(call):
    def counting(*arguments):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return counting

for name in ("pwrite", "pwritev", "posix_fallocate"):
    setattr(os, name, fatal(getattr(os, name)))
data = memoryview(content(tar, moment * 3 * SIZE, SIZE))
print("filling", flush=True)
cache.admit(tar, moment * 3 * SIZE, *(data[start:start + 16] for start in range(0, SIZE, 16)))
print("filled", flush=True)
"""


@pytest.mark.parametrize("witness", [True, False], ids=["beside a live process", "alone"])
@pytest.mark.starts
def test_killed_at_any_moment_of_a_fill(folder: Path, witness: bool) -> None:
    """One admission writes eight times; each process is killed before another of its writes, the ninth ends."""
    limit, tar = 4 * MB, tar_of(1)
    if witness:
        alive = Cache(folder, limit)
        alive.use([tar])
    out_of_date = 0
    for moment in range(1, 10):
        with process(KILLED, folder, limit, moment) as victim:
            story = victim.stdout.read()
        assert (story, victim.returncode) == (("filling\n", -signal.SIGKILL) if moment < 9 else ("filling\nfilled\n", 0))
        out_of_date += not counted(folder)[1]
        cache = alive if witness else Cache(folder, limit)
        cache.use([tar])
        assert kept(cache, tar, 30) == moment - 1 + (moment == 9), "what was admitted after each kill, and what the last one finished"
        assert admit(cache, tar, (moment * 3 + 2) * SIZE, SIZE)
        assert counted(folder) == (disk_space(folder), True)
        if not witness:
            cache.close()
    assert out_of_date == 3, "killed over the count"
    before = disk_space(folder)
    cache = Cache(folder, limit)
    assert all(admit(cache, tar, moment * 3 * SIZE, SIZE) for moment in range(5, 10))
    assert disk_space(folder) == before, "the killed had allocated it"
    assert kept(cache, tar, 30) == 9 + 5


USER = """
cache = Cache(folder, int(sys.argv[2]))
cache.use(map(tar_of, map(int, sys.argv[3:])))
print(fill(cache, tar_of(int(sys.argv[3])), 60), flush=True)
sys.stdin.readline()
"""


@pytest.mark.starts
def test_what_a_live_process_uses_stays_and_what_a_killed_one_used_makes_room(folder: Path) -> None:
    with process(USER, folder, MB, 1) as other:
        there = int(other.stdout.readline())
        cache = Cache(folder, MB)
        cache.use([tar_of(2)])
        assert not any(admit(cache, tar_of(2), number * 4 * SIZE, 4 * SIZE) for number in range(9))
        assert kept(cache, tar_of(1), 60) == there > 30
        other.kill()
        other.wait()
        assert kept(cache, tar_of(1), 60) == there, "nothing goes before the room is needed"
        assert sum(admit(cache, tar_of(2), number * 4 * SIZE, 4 * SIZE) for number in range(9)) >= 7
    assert kept(Cache(folder, MB), tar_of(1), 60) == 0
    assert disk_space(folder) <= MB


@pytest.mark.starts
def test_what_one_of_two_users_still_uses_stays(folder: Path) -> None:
    with process(USER, folder, MB, 1, 3) as one, process(USER, folder, MB, 3, 1) as two:
        there = int(one.stdout.readline()) + int(two.stdout.readline())
        one.kill()
        one.wait()
        cache = Cache(folder, MB)
        assert fill(cache, tar_of(2), 60) <= 1
        assert kept(cache, tar_of(1), 60) + kept(cache, tar_of(3), 60) == there


def test_an_earlier_stage_of_the_same_process_makes_room_least_recently_used_first(folder: Path) -> None:
    earlier = Cache(folder, MB)
    earlier.use(map(tar_of, (1, 2, 3)))
    assert [fill(earlier, tar_of(tar), 12) for tar in (1, 2, 3)] == [12, 12, 12]
    for tar, time in ((1, 1000), (2, 2000)):
        os.utime(folder / tar_of(tar), (time, time))
    assert Cache(folder, MB).holds(tar_of(1), 0, SIZE), "used again"
    later = Cache(folder, MB)
    later.use(map(tar_of, (3, 4)))
    fill(later, tar_of(4), 12)
    assert [kept(earlier, tar_of(tar), 12) for tar in (1, 2, 3)] == [12, 12, 12]
    earlier.close()
    assert not admit(earlier, tar_of(1), MB, SIZE)
    assert fill(later, tar_of(4), 12) == 12
    fresh = Cache(folder, MB)
    assert [kept(fresh, tar_of(tar), 12) for tar in (1, 2, 3)] == [12, 0, 12], "the second was used longest ago"


def test_who_had_an_evicted_file_open_admits_into_the_new_one(folder: Path) -> None:
    careless, careful = Cache(folder, MB), Cache(folder, MB)
    assert fill(careless, tar_of(1), 30) == 30
    careful.use([tar_of(2)])
    assert fill(careful, tar_of(2), 20) == 20
    assert not (folder / tar_of(1)).exists()
    assert admit(careless, tar_of(1), 40 * SIZE, SIZE)
    assert read(careful, tar_of(1), 40 * SIZE, SIZE) == content(tar_of(1), 40 * SIZE, SIZE)
    assert counted(folder) == (disk_space(folder), True)


def test_what_was_dropped_is_gone_and_can_be_replaced_though_the_cache_is_full(folder: Path) -> None:
    cache, tar = Cache(folder, MB), tar_of(1)
    cache.use([tar])
    there = fill(cache, tar, 60)
    with open(folder / tar, "r+b") as file:
        file.seek(HEAD + 3 * SIZE + 100)
        file.write(b"wrong")
    assert read(cache, tar, 3 * SIZE, SIZE) != content(tar, 3 * SIZE, SIZE)
    cache.drop(tar, 3 * SIZE, SIZE)
    assert read(cache, tar, 3 * SIZE, SIZE) is None
    assert kept(cache, tar, 60) == there - 1, "its neighbours stay"
    assert not admit(cache, tar, 100 * SIZE, SIZE)
    assert admit(cache, tar, 3 * SIZE, SIZE)
    assert kept(cache, tar, 60) == there
    assert counted(folder) == (disk_space(folder), True)


@pytest.mark.starts
def test_a_full_disk_is_warned_of_once_and_reads_go_on(folder: Path) -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD + 10 * SIZE, resource.RLIM_INFINITY))
logging.basicConfig()
cache = Cache(folder, 1 << 20)
cache.use([tar_of(1)])
print(fill(cache, tar_of(1), 20), admit(cache, tar_of(2), 0, SIZE), read(cache, tar_of(1), 0, SIZE) == content(tar_of(1), 0, SIZE))
"""
    with process(script, folder) as limited:
        assert limited.stdout.read() == "10 False True\n"
        assert limited.stderr.read().count(f"{folder}: File too large; this process keeps nothing more") == 1
    assert counted(folder) == (disk_space(folder), True)


def test_some_of_the_disk_stays_free_whatever_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(folder, 1 << 60)
    cache.use([tar_of(1)])
    assert admit(cache, tar_of(1), 0, SIZE)
    monkeypatch.setattr(cache_space, "SPARE", 1)
    assert not admit(cache, tar_of(1), SIZE, SIZE)
    assert kept(cache, tar_of(1), 2) == 1


def test_a_process_that_keeps_the_lock_stops_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_space, "TRIES", 3)
    cache = Cache(folder, MB)
    cache.use([tar_of(1)])
    assert fill(cache, tar_of(1), 3) == 3
    with open(folder / "count", "rb") as suspended:
        fcntl.flock(suspended, fcntl.LOCK_EX)
        assert fill(cache, tar_of(1), 6) == 3
        late = Cache(folder, MB)
        late.use([tar_of(1)])
        assert kept(cache, tar_of(1), 6) == kept(late, tar_of(1), 6) == 3
    assert [record.message.partition("; ")[2] for record in caplog.records] == ["this process keeps nothing more on this node's disk"] * 2
    assert "is it suspended?" in caplog.text
