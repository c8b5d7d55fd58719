"""Datasets of noise, as wide and as long as a benchmark asks for."""

from collections.abc import Callable

import numpy as np

from cluster.data.manifest import Manifest, ShardTable, Split, StreamEntry, load_manifest, publish
from cluster.data.shards import members, shard_name, upload_shard
from cluster.storage import open_store
from reactdiff.clip import PERSONS, TARGETS
from reactdiff.data.keyed import normal
from reactdiff.data.sample import Clip
from reactdiff.stage import LATENT, Source

SPLIT = "train"
CLIPS_PER_SHARD = 64
"""As `jobs/prepare.py` cuts them by default."""

ROW = 8
"""Clips that a dataset has a multiple of: whole blocks of the default order."""


def make_noise(url: str, source: Source, size: int, progress: Callable[[int, int], None]) -> str:
    """Make a dataset of noise in object storage, unless it is there; returns its URL.

    Args:
        url: folder or prefix that gets it.
        source: its streams and frames; with facial and acoustic streams it has targets, too.
        size: bytes of its tars, at least; they hold a multiple of 8 clips.
        progress: called with (clips written, clips in all).
    """
    encoded = any(spec.name == LATENT for spec in source.streams)
    targets = {} if encoded else TARGETS
    noise = {spec.name: normal((source.frames, spec.width), "bench", spec.name).astype(np.float16) for spec in source.streams}
    noise |= {name: normal((source.frames, width), "bench", name) for name, width in targets.items()}
    clips = -(-size // (len(PERSONS) * sum(array.nbytes for array in noise.values())) // ROW) * ROW
    store = open_store(f"{url}/{'latents' if encoded else 'clips'}-{sum(spec.width for spec in source.streams)}x{source.frames}-{clips}")
    try:
        load_manifest(store)
        return store.url
    except ValueError:
        pass  # none there yet
    shards = ShardTable()
    for number, first in enumerate(range(0, clips, CLIPS_PER_SHARD)):
        last = min(first + CLIPS_PER_SHARD, clips)
        clips_of_shard = (_clip(clip, noise) for clip in range(first, last))
        shards = shards.plus({number: upload_shard(store, shard_name(SPLIT, number), clips_of_shard, noise)})
        progress(last, clips)
    manifest = Manifest(
        kind="latents" if encoded else "clips",
        frames=source.frames,
        streams=[StreamEntry(name=spec.name, kind=spec.kind, width=spec.width) for spec in source.streams],
        targets=targets,
        members=list(members(noise)),
        splits={SPLIT: Split(shards=shards)},
    )
    publish(store, manifest)
    return store.url


def _clip(number: int, noise: dict[str, np.ndarray]) -> Clip:
    """A clip whose arrays are the noise from another row on."""
    shifts = enumerate(PERSONS, start=2 * number)
    return Clip(f"clip{number:08d}", {person: {name: np.roll(array, at, axis=0) for name, array in noise.items()} for at, person in shifts})
