"""Build the latents of a run's autoencoder: one task a shard, the manifest last."""

from collections.abc import Callable

from cluster.config.schema import Workers
from cluster.data.manifest import CURRENT, File, Manifest, ShardTable, Split, StreamEntry, publish
from cluster.data.shards import decode_npy, encode_npy, members
from cluster.runs.latents import CORRUPT, RANGE, EncodedShard, LatentDataset, empty_range, encode_shard, range_file, range_union
from cluster.runtime.tasks import map_tasks
from cluster.storage import AlreadyExists, content_hash, open_store
from reactdiff.stage import LATENT


def build_latents(coder: LatentDataset, workers: Workers, progress: Callable[[int, int], None]) -> Manifest:
    """Encode the whole dataset, unless that is done; shards that exist are kept.

    Args:
        coder: what to encode with, and what.
        workers: what each encoding task gets.
        progress: told (shards done, shards in all).

    Raises:
        CorruptData: if a clip of the source is damaged, unless latents of zeros were asked for (`coder.on_corrupt`).
        ValueError: if they are there and lack clips that are asked for.
    """
    target = open_store(coder.url)
    if target.exists(CURRENT):
        return coder.manifest()
    calls = [(split, position) for split, part in coder.clips.splits.items() for position in range(len(part.shards))]
    shards: dict[tuple[str, int], EncodedShard] = {}
    corrupt: dict[str, dict[int, str]] = {}
    for number, encoded in map_tasks(encode_shard, calls, workers, shared=coder):
        shards[calls[number]] = encoded
        if encoded.corrupt:
            split = calls[number][0]
            coder.assert_whole(split, encoded.corrupt)  # kept from a run that asked for zeros
            corrupt.setdefault(split, {}).update(encoded.corrupt)
        progress(len(shards), len(calls))
    splits = {
        split: Split(shards=ShardTable().plus({number: shards[split, i].info for i, number in enumerate(part.shards.number)}))
        for split, part in coder.clips.splits.items()
    }
    lacking = {CORRUPT: {split: sorted(corrupt[split].items()) for split in sorted(corrupt)}} if corrupt else {}
    manifest = Manifest(
        kind="latents",
        frames=coder.clips.frames,
        streams=[StreamEntry(name=LATENT, kind="latent", width=coder.width)],
        targets={},
        members=list(members([LATENT])),
        splits=splits,
        provenance={
            "autoencoder": coder.export.hash,
            "source": coder.source_hash,
            RANGE: _range(coder).model_dump(),
            **lacking,
        },
    )
    try:
        publish(target, manifest)
    except AlreadyExists:
        pass  # another run built the same latents at the same moment
    return coder.manifest()


def _range(coder: LatentDataset) -> File:
    """Write the range of the training split's latents, from those of its shards."""
    target, bounds = open_store(coder.url), empty_range(coder)
    for position in range(len(coder.clips.split(coder.split).shards)):
        bounds = range_union(bounds, decode_npy(target.read(range_file(coder.clips.shard(coder.split, position)))))
    if (bounds[0] > bounds[1]).any():
        raise ValueError(
            f"split {coder.split} of {coder.source} has no clips to take the latents' range from; set data.split to one that has"
        )
    data = encode_npy(bounds)
    part = File(file=f"range-{content_hash(data)}.npy", hash=content_hash(data))
    target.put(part.file, data)
    return part
