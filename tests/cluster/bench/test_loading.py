"""The benchmark of reading: three ways to the same items of the same dataset, and what each costs."""

import hashlib
import multiprocessing
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from cluster.bench.loading import WARM, ByteSpan, Done, LoadingCost, Rival, Task, Undrawn, measure, record, rival_batches, streamed, wire
from cluster.bench.noise_dataset import SPLIT, make_noise
from cluster.data.manifest import load_manifest
from cluster.data.shards import read_index
from cluster.storage import open_store
from cluster.storage.s3 import S3Store
from infra.objectstore import ObjectStore
from reactdiff.config import Diffusion
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import LATENT, AutoencoderStage, DiffusionStage, Source, Stage
from tests.conftest import BUCKET
from tests.reactdiff.model.small import MODEL

FRAMES = 50
LATENTS = DiffusionStage(MODEL, Diffusion(), Source([StreamSpec(LATENT, "latent", MODEL.latent)], FRAMES))
VOICE = MODEL.model_copy(update={"facial": (), "acoustic": ("mfcc",)})
CLIPS = AutoencoderStage(VOICE, Source([StreamSpec("mfcc", "acoustic", 26)], FRAMES))


@pytest.fixture(scope="module", params=[(LATENTS, 150_000), (CLIPS, 3_000_000)], ids=["latents", "clips"])
def made(request: pytest.FixtureRequest, object_store: ObjectStore) -> tuple[str, Stage, int]:
    """Where noise for a stage was made, the stage, and the size asked for: a full shard and a shorter one."""
    stage, size = request.param
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    make_noise(url, stage.source, size, lambda done, total: None)
    return url, stage, size


@pytest.fixture
def task(made: tuple[str, Stage, int]) -> Task:
    """Reading it, which finds it made."""
    url, stage, size = made
    there = make_noise(url, stage.source, size, lambda done, total: pytest.fail("it is made again"))
    return Task(there, Undrawn(stage), batch=6, block=16, group=2, read_ahead=1 << 20, readers=2)


def contents(batches: Iterator[dict[str, torch.Tensor]]) -> Counter[bytes]:
    """How often which item came: the hash of its arrays."""
    found: Counter[bytes] = Counter()
    for batch in batches:
        arrays = [batch[name].numpy() for name in sorted(set(batch) - {"weight"})]
        for item in zip(*arrays, strict=True):
            found[hashlib.blake2b(b"".join(array.tobytes() for array in item)).digest()] += 1
    return found


def test_our_stream_and_webdataset_deliver_the_same_items(task: Task) -> None:
    store = open_store(task.url)
    assert isinstance(store, S3Store)
    counts = load_manifest(store).counts(SPLIT).tolist()
    mine = contents(streamed(store, task, epochs=1))
    assert len(counts) == 2 and mine.total() == 2 * sum(counts)
    assert mine == contents(rival_batches(store, task))


def test_the_wire_gets_the_ranges_our_stream_asked_for_which_hold_every_member_it_reads(task: Task) -> None:
    asked, came = record(task), []

    def done(count: int) -> bool:
        came.append(count)
        return len(came) >= len(asked.ranges)

    wire(task, asked.ranges)(done)
    assert sum(came) >= len(asked.ranges) and asked.others >= 2, "dataset.json and the manifest, too"
    store = open_store(task.url)
    manifest = load_manifest(store)
    wanted = {f"{person}.{array}.npy" for side in (0, 1) for person, array in task.stage.reads(side).values()}
    columns = [place for place, name in enumerate(manifest.members) if name in wanted]
    for position in range(len(manifest.split(SPLIT).shards)):
        name = manifest.shard(SPLIT, position)
        mine = [part for part in asked.ranges if part.key == f"{name}.tar"]
        for row in read_index(store, name):
            for start, size in zip(row["offset"][columns], row["size"][columns], strict=True):
                assert any(part.start <= start and start + size <= part.start + part.length for part in mine)


def spend(task: Task, ranges: list[ByteSpan]) -> Rival:
    """A reader that holds 80 MB for a moment, and whose child computes for 0.3 s."""

    def read(done: Done) -> None:
        np.ones(10_000_000)
        for _ in range(WARM):
            done(1)
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
        done(1)

    return read


def rest(task: Task, ranges: list[ByteSpan]) -> Rival:
    """A reader that does nothing."""
    return lambda done: print(*(done(1) for _ in range(WARM + 1)))


def spend_and_rest(task: Task) -> tuple[LoadingCost, LoadingCost]:
    return measure(spend, task, [], 1), measure(rest, task, [], 1)


def test_a_cost_counts_the_memory_held_for_a_moment_and_the_time_of_children(task: Task) -> None:
    # As the benchmark does, in a process that ran nothing before: an older one gives memory back while it is measured.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        cost, after = pool.submit(spend_and_rest, task).result()
    assert cost.memory > 70_000_000 and cost.cpu >= 0.3 and cost.seconds >= 0.3 and cost.first > 0
    assert after.memory < 70_000_000, "the peak of one measurement is not that of the next"
