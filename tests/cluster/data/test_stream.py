"""The stream: the same batches whatever reads them, as few requests as neighbours allow, bounded memory, errors in their place."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data.cache import HEAD, Cache
from cluster.data.manifest import Manifest, ShardTable, Split, StreamEntry, load_manifest, publish
from cluster.data.quarantine import Quarantine
from cluster.data.shards import CorruptData, members, read_index
from cluster.data.stream import Share
from cluster.storage import StorageError, Store, content_hash, open_store
from reactdiff.clip import TARGETS
from tests.cluster.support.streaming import (
    FRAMES,
    Recorded,
    cut,
    damage,
    expected,
    joined,
    ledgers,
    make_clips,
    make_latents,
    open_stream,
    order_of,
    read_all,
    same,
)
from tests.cluster.support.training import train_on
from tests.tiny import tiny

WIDE = 2800
"""Features that make an array of 280 kB: large enough to be received where it is needed."""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 clips in shards of 13, 0, 1 and 17; not to be changed."""
    folder = tmp_path_factory.mktemp("latents")
    make_latents(open_store(str(folder)), [13, 0, 1, 17])
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 wide clips in two shards; not to be changed."""
    folder = tmp_path_factory.mktemp("clips")
    make_clips(open_store(str(folder)), [10, 6], mfcc=WIDE)
    return folder


@pytest.mark.parametrize("dataset", ["latents", "clips"])
def test_each_item_is_what_was_written_with_the_noise_of_its_position(dataset: str, request: pytest.FixtureRequest) -> None:
    store = open_store(str(request.getfixturevalue(dataset)))
    manifest = load_manifest(store)
    order, total = order_of(manifest), 2 * int(manifest.counts("train").sum())
    batches = read_all(store, Share(5, total + 7, 1, 0))
    assert [position for batch in batches for position in batch.positions] == list(range(total + 7))
    for batch in batches:
        assert batch.items == order.at(np.array(batch.positions)).tolist()
        for row, (item, position) in enumerate(zip(batch.items, batch.positions, strict=True)):
            for name, array in (arrays := expected(manifest, item, position)).items():
                found = batch.tensors[name][row].numpy()
                assert found.dtype == array.dtype and np.array_equal(found, array), (name, item, position)
            assert batch.tensors.keys() == arrays.keys() | {"weight"}
        assert batch.tensors["weight"].tolist() == [1.0] * len(batch.items) and batch.valid == len(batch.items)
        assert all(tensor.is_contiguous() and len(tensor) == len(batch.items) for tensor in batch.tensors.values())


@pytest.mark.parametrize("dataset", ["latents", "clips"])
def test_readers_and_read_ahead_change_nothing(dataset: str, request: pytest.FixtureRequest) -> None:
    store, share = open_store(str(request.getfixturevalue(dataset))), Share(5, 49, 2, 1)
    first = read_all(store, share, readers=1, read_ahead=1)
    for readers, read_ahead in ((3, 1), (2, 3_000_000), (4, 1 << 30)):
        again = read_all(store, share, readers=readers, read_ahead=read_ahead)
        assert len(again) == len(first) and all(map(same, again, first))


def test_it_goes_on_from_any_step(latents: Path) -> None:
    store, share = open_store(str(latents)), Share(6, 100, 1, 0)
    whole = read_all(store, share)
    for step in (0, 1, 9, 16, 17):
        rest = read_all(store, share, first_step=step)
        assert len(rest) == 17 - step and all(map(same, rest, whole[step:]))


def test_batches_that_are_kept_stay_as_they_were(clips: Path) -> None:
    stream = open_stream(open_store(str(clips)), Share(4, 96, 1, 0), read_ahead=1)
    kept, copies = [], []
    for batch in stream.batches(0):
        kept.append(batch)
        copies.append({name: tensor.clone() for name, tensor in batch.tensors.items()})
    stream.close()
    assert all(bool((batch.tensors[name] == copy[name]).all()) for batch, copy in zip(kept, copies, strict=True) for name in copy)
    assert len({tensor.data_ptr() for batch in kept for tensor in batch.tensors.values()}) == sum(len(batch.tensors) for batch in kept)


def test_neighbours_are_read_together_and_what_nobody_wants_is_not(tmp_path: Path) -> None:
    """One block is one step here: both persons of eight clips that lie side by side."""
    store = Recorded(tmp_path)
    manifest = make_clips(store, [40, 24])
    order = order_of(manifest, block=16, group=1)
    batches = read_all(store, Share(16, 128, 1, 0), order=order, readers=1, read_ahead=1)
    items = sum(len(batch.items) for batch in batches)
    assert items == 128 and len(store.reads) <= items // 16
    assert sum(size for _, _, size in store.reads) <= sum(info.stat().st_size for info in tmp_path.rglob("*.tar"))


def test_a_block_is_not_read_in_two_pieces(tmp_path: Path) -> None:
    """A group is two shards and two steps; a window has room for three, which would take every other group in halves."""
    store, width = Recorded(tmp_path), 16
    manifest = make_latents(store, [8] * 8, width=width)
    order, window = order_of(manifest, block=16, group=2), 3 * 16 * 2 * FRAMES * width * 2
    batches = read_all(store, Share(16, 2 * 128, 1, 0), order=order, readers=1, read_ahead=3 * window)
    assert sum(len(batch.items) for batch in batches) == 2 * 128
    assert len(store.reads) == 2 * 8 + 2, "but for the first group, of which the first window has one step"


def test_what_the_model_does_not_read_is_left_where_it_is(tmp_path: Path) -> None:
    store = Recorded(tmp_path)
    manifest = make_clips(store, [12], unread=2000)
    read_all(store, Share(8, 24, 1, 0))
    index = read_index(store, manifest.shard("train", 0))
    wanted = sum(
        int(index["size"][:, place].sum()) for place, name in enumerate(manifest.members) if name.endswith("npy") and "unread" not in name
    )
    assert sum(size for _, _, size in store.reads) < 1.2 * wanted
    assert sum(size for _, _, size in store.reads) < 0.2 * (tmp_path / "train/000000.tar").stat().st_size


def test_both_directions_of_a_clip_in_one_window_are_one_read(tmp_path: Path) -> None:
    """A step is a block, so that the window is at least that."""
    store = Recorded(tmp_path)
    manifest = make_latents(store, [8, 8], width=400)
    order = order_of(manifest, block=16, group=1)
    batches = read_all(store, Share(16, 32, 1, 0), order=order)
    assert sum(size for _, _, size in store.reads) <= sum(info.stat().st_size for info in tmp_path.rglob("*.tar"))
    crcs = [read_index(store, manifest.shard("train", shard))["crc"][:, :2].sum() for shard in range(2)]
    assert sum(batch.ledger for batch in batches) == 2 * int(sum(crcs)), "the ledger still counts each item's bytes"


def test_no_more_is_read_ahead_than_was_allowed(tmp_path: Path) -> None:
    """What was asked of the store and has not been handed over, at every request; the consumer lets the readers run until they stop."""
    allowed, delivered, most = 3_000_000, [0], [0]

    class Watched(Recorded):
        def noticed(self) -> None:
            most[0] = max(most[0], sum(size for _, _, size in self.reads) - delivered[0])

    store = Watched(tmp_path)
    make_clips(store, [30], mfcc=WIDE)
    stream = open_stream(store, Share(2, 120, 1, 0), read_ahead=allowed)
    step = 0
    for batch in stream.batches(0):
        reads = -1
        while reads < (reads := len(store.reads)):
            time.sleep(0.02)
        step = sum(tensor.nbytes for tensor in batch.tensors.values())
        delivered[0] += step
    stream.close()
    assert most[0] >= allowed / 3, "it does read ahead"
    assert most[0] <= 1.02 * (allowed + step)


RESIDENT = """
import sys
from tests.memory import kilobytes
from cluster.storage import open_store
from cluster.data.stream import Share
from tests.cluster.support.streaming import open_stream
stream = open_stream(open_store(sys.argv[1]), Share(4, int(sys.argv[2]), 1, 0), read_ahead=4 << 20)
before = kilobytes("VmRSS")
size = sum(batch.bytes for batch in stream.batches(0))
stream.close()
print(size, 1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.starts
def test_memory_does_not_grow_with_what_has_been_read(clips: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(clips), "440"], check=True, capture_output=True, text=True)
    read, grown = map(int, done.stdout.split())
    assert read > 100 << 20 and grown < 40 << 20


@pytest.mark.parametrize("after", [None, 0, 3])
def test_closing_early_leaves_no_thread(clips: Path, after: int | None) -> None:
    before = set(threading.enumerate())
    stream = open_stream(open_store(str(clips)), Share(4, 64, 1, 0), readers=3)
    batches = stream.batches(0)
    if after is not None:
        for _ in range(after + 1):
            next(batches)
        assert set(threading.enumerate()) - before, "there was something to stop"
    stream.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("read_ahead", [1, 64 << 20])
def test_wrong_bytes_end_the_stream_at_their_own_step_and_not_before(tmp_path: Path, read_ahead: int) -> None:
    store = open_store(str(tmp_path))
    manifest, share = make_clips(store, [9, 9]), Share(4, 36, 1, 0)
    whole = read_all(store, share)
    items = order_of(manifest).at(np.arange(36)).tolist()
    victim = items[22]
    shard, row = divmod(victim // 2, 9)
    damage(store, shard, row, f"{'ab'[victim % 2]}.coefficients.npy")
    stream, got = open_stream(store, share, read_ahead=read_ahead), []
    with pytest.raises(CorruptData, match=f"shard train/00000{shard}, clip clip-{shard}-{row}, member .*coefficients"):
        for batch in stream.batches(0):
            got.append(batch)
    stream.close()
    assert len(got) == 5 and all(map(same, got, whole[:5]))


@pytest.mark.parametrize("on_disk", [False, True], ids=["", "cache"])
def test_a_tar_that_ends_too_early_costs_the_items_beyond_its_end_and_no_others(tmp_path: Path, on_disk: bool) -> None:
    """Whatever is read together: windows of one step or of all, on one rank or three, the same items are damaged for the same reason."""
    store, share = open_store(str(tmp_path / "shards")), Share(4, 72, 1, 0)
    make_clips(store, [9, 9])
    whole = read_all(store, share)
    key = cut(store, 1, 8, "b.coefficients.npy")
    stream = open_stream(store, share)
    with pytest.raises(CorruptData, match=rf"shard train/000001, clip {key}, member b\.\w+\.npy: the tar ends before all of it"):
        list(stream.batches(0))
    stream.close()
    lost, reasons = {2 * 17 + 1}, set()
    for number, (read_ahead, ranks) in enumerate([(1, 1), (64 << 20, 1), (1, 3), (64 << 20, 3)]):
        cache = Cache(tmp_path / f"cache{number}", 1 << 30) if on_disk else None
        shares = [Share(4, 72, ranks, rank) for rank in range(ranks)]
        got = [read_all(store, one, read_ahead=read_ahead, cache=cache, quarantine=Quarantine()) for one in shares]
        corrupt = [bad for batches in got for batch in batches for bad in batch.corrupt]
        assert {bad.item for bad in corrupt} == lost
        reasons |= {(bad.item, bad.position, bad.why) for bad in corrupt}
        for step, parts in zip(whole, zip(*got, strict=True), strict=True):
            sound = [item not in lost for item in step.items]
            assert all(torch.equal(tensor[sound], step.tensors[name][sound]) for name, tensor in joined(parts).items())
            assert sum(part.ledger for part in parts) == sum(step.checksums[sound])
    assert len(reasons) == 2, "one in each epoch"


def test_a_shard_that_is_gone_ends_the_stream_at_the_first_step_that_wants_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest, share = make_clips(store, [9, 9, 4]), Share(4, 44, 1, 0)
    plan = [item // 2 >= 18 for item in order_of(manifest).at(np.arange(44)).tolist()]
    step = plan.index(True) // 4
    assert step > 0
    (tmp_path / "train/000002.tar").unlink()
    stream, got = open_stream(store, share), []
    with pytest.raises(StorageError, match=r"train/000002\.tar"):
        for batch in stream.batches(0):
            got.append(batch)
    stream.close()
    assert len(got) == step


@pytest.mark.parametrize(
    ("counts", "batch", "total", "ranks"),
    [
        pytest.param([9], 4, 18, 3, id="fewer shards than ranks"),
        pytest.param([1] * 7, 5, 31, 2, id="one clip a shard, a total that is neither whole batches nor whole epochs"),
        pytest.param([30], 8, 64, 4, id="one giant shard"),
        pytest.param([5, 4], 7, 20, 3, id="a batch that the ranks do not divide, and a short last step"),
        pytest.param([3, 2], 2, 9, 5, id="a batch smaller than the ranks"),
        pytest.param([1], 3, 7, 4, id="one clip, several times in a step"),
        pytest.param([0, 0, 1, 0, 2], 100, 6, 2, id="empty shards, and a run shorter than a batch"),
    ],
)
def test_all_ranks_together_have_each_step_whole(store: Store, counts: list[int], batch: int, total: int, ranks: int) -> None:
    make_latents(store, counts)
    whole = read_all(store, Share(batch, total, 1, 0))
    shares = [read_all(store, Share(batch, total, ranks, rank)) for rank in range(ranks)]
    assert all(len(share) == len(whole) == -(-total // batch) for share in shares)
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [position for part in parts for position in part.positions] == list(one.positions)
        assert [item for part in parts for item in part.items] == one.items
        assert sum(part.ledger for part in parts) == one.ledger
        assert all(bool((tensor == one.tensors[name]).all()) for name, tensor in joined(parts).items())


@pytest.mark.starts
def test_training_with_a_batch_smaller_than_the_ranks_and_one_clip_a_shard(tmp_path: Path) -> None:
    """7 steps of one item on 2 ranks: one of them never has any."""
    store = open_store(str(tmp_path / "shards"))
    manifest = make_clips(store, [1] * 5)
    experiment = tiny(tmp_path / "shards", tmp_path, "model.facial=[]", "optim.batch=1", "optim.epochs=0.7")
    rows = train_on(2, experiment, tmp_path / "run")
    order = order_of(manifest, block=experiment.data.block, group=experiment.data.group)
    assert [row["ledger"] for row in rows] == ledgers(store, 1, 7, order=order) and len(rows) == 7
    assert np.isfinite([row["loss"] for row in rows]).all()


@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 40), st.data())
def test_no_position_is_read_by_two_ranks(batch: int, total: int, ranks: int, data: st.DataObject) -> None:
    steps = Share(batch, total, 1, 0).steps
    step = data.draw(st.integers(0, steps - 1))
    read = [position for rank in range(ranks) for position in Share(batch, total, ranks, rank).positions(step)]
    assert sorted(read) == list(range(step * batch, min((step + 1) * batch, total)))


@settings(max_examples=12)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.integers(1, 20), st.integers(0, 9), st.data())
def test_changing_ranks_in_the_middle_of_an_epoch_leaves_the_ledger_as_it_was(latents, ranks, batch, seed, data) -> None:
    store, total = open_store(str(latents)), 80
    whole = ledgers(store, batch, total, seed=seed)
    first, second = sorted(data.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2)))
    lives = [ledgers(store, batch, total, each, seed=seed, first_step=step) for each, step in zip(ranks, (0, first, second), strict=True)]
    assert lives[0][:first] + lives[1][: second - first] + lives[2] == whole


START = """
import sys, time
from tests.memory import kilobytes
from cluster.data.stream import Share, Stream
from cluster.storage import open_store
from tests.cluster.support.streaming import open_stream
store, before, start = open_store(sys.argv[1]), kilobytes("VmRSS"), time.process_time()
stream = open_stream(store, Share(64_000, 10**9, 1000, 999))
print(time.process_time() - start, (kilobytes("VmHWM") - before) / 1024)
stream.close()
"""


@pytest.mark.starts
def test_a_stream_of_100_000_shards_starts_in_2_seconds_and_64_megabytes(tmp_path: Path) -> None:
    """Manifest, reader, order and stream of a rank of a thousand; 10^8 clips of which none is touched."""
    count = 100_000
    digests = "".join(content_hash(number.to_bytes(4)) for number in range(count))
    columns = {"number": list(range(count)), "clips": [1000] * count, "bytes": list(range(10**9, 10**9 + count))}
    manifest = Manifest(
        kind="clips",
        frames=FRAMES,
        streams=[StreamEntry(name="mfcc", kind="acoustic", width=26)],
        targets=dict(TARGETS),
        members=list(members(["mfcc", *TARGETS])),
        splits={"train": Split(shards=ShardTable(**columns, tar=digests, index=digests))},
    )
    publish(open_store(str(tmp_path)), manifest)
    done = subprocess.run([sys.executable, "-c", START, str(tmp_path)], check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 2 and megabytes < 64, done.stdout


def test_the_second_epoch_comes_from_the_cache_and_is_the_same(latents: Path, tmp_path: Path) -> None:
    plain, share = read_all(open_store(str(latents)), Share(6, 124, 1, 0)), Share(6, 124, 1, 0)
    store, folder = Recorded(latents), tmp_path / "cache"
    stream = open_stream(store, share, cache=Cache(folder, 1 << 30))
    first = [batch for batch, _ in zip(stream.batches(0), range(11), strict=False)]
    stream.close()
    assert all(map(same, first, plain)) and store.reads
    again = Recorded(latents)
    rest = read_all(again, share, first_step=11, cache=Cache(folder, 1 << 30))
    assert len(rest) == 10 and all(map(same, rest, plain[11:]))
    assert again.reads == []


def test_a_cache_that_is_too_small_keeps_what_it_can_and_changes_nothing(clips: Path, tmp_path: Path) -> None:
    share, folder, limit = Share(4, 128, 1, 0), tmp_path / "cache", 4 << 20
    plain, store = read_all(open_store(str(clips)), share), Recorded(clips)
    for _ in range(2):
        store.reads.clear()
        batches = read_all(store, share, cache=Cache(folder, limit))
        assert len(batches) == len(plain) and all(map(same, batches, plain))
        assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) <= limit
    assert 0 < sum(size for _, _, size in store.reads) < 4 * 7 * plain[0].tensors["mfcc"].nbytes


def test_damaged_bytes_in_the_cache_are_read_from_the_store_again(clips: Path, tmp_path: Path) -> None:
    folder, share = tmp_path / "cache", Share(4, 64, 1, 0)
    plain = read_all(open_store(str(clips)), share, cache=Cache(folder, 1 << 30))
    manifest, store = load_manifest(open_store(str(clips))), Recorded(clips)
    entry = read_index(store, "train/000000")[3]
    with open(folder / manifest.split("train").shards.info(0).tar, "r+b") as file:
        file.seek(HEAD + int(entry["offset"][0]) + 1000)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert byte, "it was there"
    batches = read_all(store, share, cache=Cache(folder, 1 << 30))
    assert len(batches) == len(plain) and all(map(same, batches, plain))
    assert {key for key, _, _ in store.reads} == {"train/000000.tar"}  # by each thread that meets the damage before it is mended
    mended = Recorded(clips)
    assert all(map(same, read_all(mended, share, cache=Cache(folder, 1 << 30)), plain)) and mended.reads == []


RANK = """
import os, signal, sys
from pathlib import Path
from cluster.data.cache import Cache
from cluster.storage import open_store
from cluster.data.stream import Share
from tests.cluster.support.streaming import ledgers
data, folder, limit, fatal = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
write, calls = os.pwritev, []
def dying(*arguments):
    calls.append(1)
    if len(calls) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
os.pwritev = dying
print(ledgers(open_store(data), 4, 96, cache=Cache(folder, limit), readers=3, read_ahead=2 << 20))
"""


@pytest.mark.parametrize("fatal", [1, 7])
@pytest.mark.starts
def test_a_rank_killed_while_it_fills_the_cache_leaves_nothing_to_clean_up(clips: Path, tmp_path: Path, fatal: int) -> None:
    """Disk space is allocated, and its bytes are about to be written, when SIGKILL comes."""
    folder, share = tmp_path / "cache", Share(4, 96, 1, 0)
    command = [sys.executable, "-c", RANK, str(clips), str(folder), str(1 << 30), str(fatal)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert any(path.stat().st_size > HEAD for path in folder.iterdir() if path.is_file()), "it had begun"
    plain = read_all(open_store(str(clips)), share)
    assert all(map(same, read_all(open_store(str(clips)), share, cache=Cache(folder, 1 << 30)), plain))
    store = Recorded(clips)
    assert all(map(same, read_all(store, share, cache=Cache(folder, 1 << 30)), plain))
    assert store.reads == [], "by now all of it is there"


@pytest.mark.starts
def test_two_runs_share_a_cache_at_the_same_time(clips: Path, tmp_path: Path) -> None:
    """It has room for most of their dataset, and not for all."""
    folder, limit = tmp_path / "cache", 8 << 20
    command = [sys.executable, "-c", RANK, str(clips), str(folder), str(limit), "0"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [json.loads(run.communicate()[0]) for run in runs]
    assert said == [ledgers(open_store(str(clips)), 4, 96)] * 2
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) <= limit
