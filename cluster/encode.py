"""Build the latents of a run's autoencoder: one task a shard, the manifest last."""

from collections.abc import Callable

import numpy as np

from cluster.config import Workers
from cluster.latents import RANGE, Coder, encode_shard, range_file, wider
from cluster.manifest import File, Manifest, Shards, Split, Stream, load_manifest, publish
from cluster.shards import ShardInfo, decode_npy, encode_npy, members
from cluster.storage import AlreadyExists, Store, content_hash, open_store
from cluster.tasks import each
from reactdiff.stage import LATENT


def build_latents(coder: Coder, workers: Workers, progress: Callable[[int, int], None]) -> Manifest:
    """Encode the whole dataset, unless that is done; shards that exist are kept.

    Args:
        coder: what to encode with, and what.
        workers: what each encoding task gets.
        progress: told (shards done, shards in all).
    """
    target = open_store(coder.url)
    try:
        return load_manifest(target)
    except ValueError:
        pass  # none there yet
    calls = [(split, position) for split, part in coder.clips.splits.items() for position in range(len(part.shards))]
    infos: dict[tuple[str, int], ShardInfo] = {}
    for number, info in each(encode_shard, calls, workers, shared=coder):
        infos[calls[number]] = ShardInfo(**info)
        progress(len(infos), len(calls))
    splits = {
        split: Split(shards=Shards().plus({number: infos[split, i] for i, number in enumerate(part.shards.number)}))
        for split, part in coder.clips.splits.items()
    }
    manifest = Manifest(
        kind="latents",
        frames=coder.clips.frames,
        streams=[Stream(name=LATENT, kind="latent", width=coder.width)],
        targets={},
        members=list(members([LATENT])),
        splits=splits,
        provenance={
            "autoencoder": coder.export.hash,
            "source": coder.source_hash,
            RANGE: _merge_ranges(target, [coder.clips.shard(*call) for call in calls if call[0] == coder.split]).model_dump(),
        },
    )
    try:
        publish(target, manifest)
    except AlreadyExists:
        pass  # another run built the same latents at the same moment
    return load_manifest(target)


def _merge_ranges(target: Store, names: list[str]) -> File:
    bounds: np.ndarray | None = None
    for name in names:
        bounds = wider(bounds, decode_npy(target.read(range_file(name))))
    if bounds is None:
        raise ValueError(f"the split the latents' range is taken from has no shards ({target.url}); set data.split to one that has clips")
    data = encode_npy(bounds)
    part = File(file=f"range-{content_hash(data)}.npy", hash=content_hash(data))
    target.put(part.file, data)
    return part
