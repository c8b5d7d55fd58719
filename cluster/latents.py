"""Latents: what the finished autoencoder makes of every person, as a dataset of its own that runs and trials share.

It lies at `<store>/latents/<hash of encoder, source state, encoding>`; its shards mirror the source's one by one, each a function of
its source shard alone, so it is built in parallel, resumed, and built once. The manifest comes last. Raw latents are stored;
their range over the training split lies beside them.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cluster.experiment import digest
from cluster.export import Export, load_codec
from cluster.manifest import File, Manifest, load_manifest, read_part
from cluster.reader import Reader
from cluster.shards import decode_npy, encode_npy, write_shard
from cluster.storage import NotFound, Store, open_store
from reactdiff.clip import PERSONS
from reactdiff.data.sample import Clip
from reactdiff.determinism import make_deterministic
from reactdiff.model.codec import Codec
from reactdiff.stage import LATENT, AutoencoderStage

THREADS = 1
ENCODING = {"version": 2, "persons at once": 2, "threads": THREADS, "dtype": "float16"}
"""How persons are encoded; part of what a dataset of latents is named by."""

RANGE = "range"
"""Key of the manifest's provenance that names the file with the training split's range, (2, frames, latent) float32."""


@dataclass(frozen=True)
class Coder:
    """A finished autoencoder, one state of a dataset, and with them the latents.

    Attributes:
        export: of the autoencoder.
        run: URL of the run's folder that holds it.
        source: URL of the dataset of clips.
        source_hash: hash of its state.
        store: URL the latents lie under.
        split: whose latents give the range.
    """

    export: Export
    run: str
    source: str
    source_hash: str
    store: str
    split: str

    @property
    def width(self) -> int:
        """Features of an encoded frame."""
        kind = self.export.kind
        assert isinstance(kind, AutoencoderStage)
        return kind.encoded().width(LATENT)

    @property
    def url(self) -> str:
        """Where the latents are, or will be."""
        return f"{self.store}/latents/{digest([self.export.hash, self.source_hash, self.split, ENCODING])}"

    def manifest(self) -> Manifest:
        """The latents' manifest.

        Raises:
            ValueError: if they have not been built.
        """
        return load_manifest(open_store(self.url))

    @cached_property
    def clips(self) -> Manifest:
        """The source's manifest."""
        return load_manifest(open_store(self.source), self.source_hash)


def read_range(store: Store, manifest: Manifest) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of the training split's latents, (frames, latent) each."""
    low, high = torch.from_numpy(decode_npy(read_part(store, File(**manifest.provenance[RANGE]))).astype(np.float32))
    return low, high


def encode(codec: Codec, reader: Reader, clip: int) -> dict[str, np.ndarray]:
    """Both persons' latents of a clip: person -> (frames, latent) float16. Both are encoded at once, always."""
    names = codec.inputs
    read = reader.read(clip, [(person, name) for person in PERSONS for name in names])
    streams = {name: torch.from_numpy(np.stack([read.arrays[person, name] for person in PERSONS])).to(codec.device) for name in names}
    with torch.no_grad():
        latents = codec.encode(streams).float().cpu().numpy()
    return {person: latent.astype(np.float16) for person, latent in zip(PERSONS, latents, strict=True)}


def encode_shard(coder: Coder, split: str, position: int) -> dict:
    """Encode one shard, unless that is done; returns its `ShardInfo` as a dict."""
    target, name = open_store(coder.url), coder.clips.shard(split, position)
    try:
        return json.loads(target.read(_done(name)))
    except NotFound:
        pass
    make_deterministic(THREADS)
    codec = load_codec(open_store(coder.run), coder.export)
    reader = Reader(open_store(coder.source), coder.clips, split)
    first = int(reader.counts[:position].sum())
    clips: list[Clip] = []
    bounds: np.ndarray | None = None
    for clip in range(first, first + int(reader.counts[position])):
        latents = encode(codec, reader, clip)
        clips.append(Clip(reader.key(clip), {person: {LATENT: latent} for person, latent in latents.items()}))
        bounds = wider(bounds, np.stack([f(list(latents.values()), axis=0) for f in (np.min, np.max)]))
    assert bounds is not None, "a shard has at least one clip"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        info = write_shard(path, clips, [LATENT])
        target.put_file(f"{name}.tar", path)
        target.put_file(f"{name}.index.npy", path.with_suffix(".index.npy"))
    target.put(range_file(name), encode_npy(bounds))
    target.put(_done(name), json.dumps(asdict(info)).encode())
    return asdict(info)


def wider(bounds: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """The smallest range that holds both, each (2, frames, latent) of minimum and maximum."""
    return other if bounds is None else np.stack((np.minimum(bounds[0], other[0]), np.maximum(bounds[1], other[1])))


def range_file(name: str) -> str:
    """Where the range of one shard's latents lies, (2, frames, latent)."""
    return f"{name}.range.npy"


def _done(name: str) -> str:
    return f"{name}.done.json"
