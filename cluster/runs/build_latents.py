"""Build the latents of a run's autoencoder: one task a shard, the manifest last."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from cluster.config.schema import Workers
from cluster.data.manifest import CURRENT, File, Manifest, ShardTable, Split, StreamEntry, publish
from cluster.data.shards import decode_npy, encode_npy, members
from cluster.runs.latents import CORRUPT, MOMENTS, RANGE, EncodedShard, LatentDataset, empty_range, encode_shard, range_union
from cluster.runtime.tasks import Account, map_tasks
from cluster.storage import AlreadyExists, Store, content_hash
from cluster.storage.parallel import parallel_map


def build_latents(
    latents: LatentDataset, workers: Workers, progress: Callable[[int, int], None], account: Account | None = None
) -> Manifest:
    """Encode the whole dataset, unless that is done; shards that exist are kept.

    Args:
        latents: what to encode with, and what.
        workers: what each encoding task gets.
        progress: told (shards done, shards in all).
        account: told where the time of the tasks goes.

    Raises:
        CorruptData: if a clip of the source is damaged, unless latents of zeros were asked for (`latents.on_corrupt`).
        ValueError: if they are there and lack clips that are asked for.
    """
    if latents.store.exists(CURRENT):
        return latents.manifest()
    calls = [(split, position) for split, part in latents.clips.splits.items() for position in range(len(part.shards))]
    shards: dict[tuple[str, int], EncodedShard] = {}
    corrupt: dict[str, dict[int, str]] = {}
    for number, encoded in map_tasks(encode_shard, calls, workers, shared=latents, account=account):
        shards[calls[number]] = encoded
        if encoded.corrupt:
            split = calls[number][0]
            latents.assert_whole(split, encoded.corrupt)  # kept from a run that asked for zeros
            corrupt.setdefault(split, {}).update(encoded.corrupt)
        progress(len(shards), len(calls))
    made = {split: [shards[split, position] for position in range(len(part.shards))] for split, part in latents.clips.splits.items()}
    lacking = {CORRUPT: {split: sorted(corrupt[split].items()) for split in sorted(corrupt)}} if corrupt else {}
    manifest = Manifest(
        kind="latents",
        frames=latents.clips.frames,
        streams=[StreamEntry(name=name, kind="latent", width=width) for name, width in latents.parts.items()],
        targets={},
        members=list(members(latents.parts)),
        splits={split: Split(shards=ShardTable().plus({one.number: one.info for one in every})) for split, every in made.items()},
        provenance={
            "autoencoder": latents.export.hash,
            "source": latents.source_hash,
            RANGE: _range(latents, made[latents.split]).model_dump(),
            **_moments(latents, made[latents.split]),
            **lacking,
        },
    )
    try:
        publish(latents.store, manifest)
    except AlreadyExists:
        pass  # another run built the same latents at the same moment
    return latents.manifest()


def _range(latents: LatentDataset, shards: Sequence[EncodedShard]) -> File:
    """Write the range of the training split's latents, from those of its shards."""
    store, bounds = latents.store, empty_range(latents)
    for data in parallel_map(store.read, [shard.range for shard in shards]):
        bounds = range_union(bounds, decode_npy(data))
    if (bounds[0] > bounds[1]).any():
        raise ValueError(
            f"split {latents.split} of {latents.dataset.url} has no clips to take the latents' range from; set data.split to one that has"
        )
    return _kept(store, RANGE, bounds)


def _moments(latents: LatentDataset, shards: Sequence[EncodedShard]) -> dict[str, dict[str, str]]:
    """Write mean and standard deviation of the training split's latents; nothing where a shard was made before sums were kept."""
    if not all(shard.sums for shard in shards):
        return {}
    # One after the other: those of many shards at once take gigabytes. From zeros and in order, for each other way has other last bits.
    sums = map(decode_npy, parallel_map(latents.store.read, [shard.sums for shard in shards]))
    count, total, squares = reduce(np.add, sums, np.zeros((3, latents.width)))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    return {MOMENTS: _kept(latents.store, MOMENTS, np.stack((mean, deviation))).model_dump()}


def _kept(store: Store, what: str, array: np.ndarray) -> File:
    data = encode_npy(array)
    part = File(file=f"{what}-{content_hash(data)}.npy", hash=content_hash(data))
    store.put(part.file, data)
    return part
