"""Latents: what the finished autoencoder makes of every person, as a dataset of its own that runs and trials share.

It lies at `<store>/latents/<hash of encoder, source state, encoding>`; its shards mirror the source's one by one, each a function of
its source shard alone, so it is built in parallel, resumed, and built once. Two devices may encode to other last bits: names carry
the hash of what is in them, so nothing is overwritten, and whoever creates a shard's `done` record first decides. The manifest comes
last. Raw latents are stored; their range over the training split lies beside them.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch

from cluster.config.identity import digest
from cluster.data.manifest import File, Manifest, load_manifest, read_file
from cluster.data.reader import Reader
from cluster.data.shards import CorruptData, ShardInfo, decode_npy, encode_npy, hashed_name, upload_shard
from cluster.runs.export import Export, load_codec
from cluster.runtime.stuck import alive
from cluster.storage import AlreadyExists, NotFound, Store, content_hash
from cluster.storage.parallel import parallel_map
from reactdiff.clip import PERSONS
from reactdiff.data.sample import Clip
from reactdiff.determinism import make_deterministic
from reactdiff.model.codec import Codec
from reactdiff.stage import AutoencoderStage

log = logging.getLogger(__name__)

THREADS = 1
ENCODING = {"version": 2, "persons at once": 2, "threads": THREADS, "dtype": "float16"}
"""How persons are encoded; part of what a dataset of latents is named by."""

READ_AHEAD = 256 << 20
"""Bytes of clips that a task reads ahead of the one that it encodes, where that is one clip or more."""

MOST_AHEAD = 16
"""Clips that it reads ahead at most, however small they are."""

CORRUPT = "corrupt"
"""Key of the manifest's provenance, where the source was damaged: split -> [clip, why] of each clip whose latents are zeros."""

RANGE = "range"
"""Key of the manifest's provenance that names the file with the training split's range, (2, frames, latent) float32."""

MOMENTS = "moments"
"""Key of the manifest's provenance that names the file with the training split's mean and standard deviation, (2, latent) float64."""


@dataclass(frozen=True)
class LatentDataset:
    """A finished autoencoder, one state of a dataset, and with them the latents.

    Attributes:
        export: of the autoencoder.
        run: folder of the run that holds it.
        dataset: of clips.
        source_hash: hash of its state.
        home: the store that latents lie in, below `latents/`.
        split: whose latents give the range.
        on_corrupt: "quarantine": a clip whose bytes are damaged gets latents of zeros, and is listed; "stop": there are none such.
    """

    export: Export
    run: Store
    dataset: Store
    source_hash: str
    home: Store
    split: str
    on_corrupt: str

    @property
    def parts(self) -> dict[str, int]:
        """What an encoded frame consists of, and the features of each."""
        kind = self.export.kind
        assert isinstance(kind, AutoencoderStage)
        return {spec.name: spec.width for spec in kind.encoded().streams}

    @property
    def width(self) -> int:
        """Features of an encoded frame."""
        return sum(self.parts.values())

    @cached_property
    def store(self) -> Store:
        """Where the latents are, or will be."""
        return self.home.at(f"latents/{digest([self.export.hash, self.source_hash, self.split, ENCODING])}")

    def manifest(self) -> Manifest:
        """The latents' manifest.

        Raises:
            ValueError: if they have not been built, or lack clips although `on_corrupt` is "stop".
        """
        manifest = load_manifest(self.store)
        for split in manifest.splits:
            self.assert_whole(split, corrupt_clips(manifest, split))
        return manifest

    def assert_whole(self, split: str, corrupt: Mapping[int, str]) -> None:
        """Refuse latents that lack clips of a split, unless that was asked for.

        Raises:
            ValueError: if clips are lacking and `on_corrupt` is "stop".
        """
        if corrupt and self.on_corrupt == "stop":
            clip, why = next(iter(corrupt.items()))
            raise ValueError(
                f"the latents in {self.store.url} lack {len(corrupt)} clips of split {split}, of which the source was damaged when they "
                f"were made, first clip {clip} ({why}). Mend the source, delete that folder and give the same command again; "
                "or train without them: data.on_corrupt=quarantine"
            )

    @cached_property
    def clips(self) -> Manifest:
        """The source's manifest."""
        return load_manifest(self.dataset, self.source_hash)

    @cached_property
    def codec(self) -> Codec:
        """The autoencoder."""
        return load_codec(self.run, self.export)


def corrupt_clips(manifest: Manifest, split: str) -> dict[int, str]:
    """The clips of a split whose latents are zeros because the source was damaged, and the damage; none in a dataset of clips."""
    return dict(manifest.provenance.get(CORRUPT, {}).get(split, [])) if manifest.kind == "latents" else {}


def read_range(store: Store, manifest: Manifest) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of the training split's latents, (frames, latent) each."""
    low, high = torch.from_numpy(decode_npy(read_file(store, File(**manifest.provenance[RANGE]))).astype(np.float32))
    return low, high


def read_moments(store: Store, manifest: Manifest) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the training split's latents, (latent,) each.

    Raises:
        ValueError: if they were made before these were kept.
    """
    if MOMENTS not in manifest.provenance:
        raise ValueError(
            f"the latents in {store.url} were made by a version that kept no mean of them, which diffusion.normalisation=variance needs: "
            "delete that folder and give the same command again"
        )
    mean, deviation = torch.from_numpy(decode_npy(read_file(store, File(**manifest.provenance[MOMENTS]))).astype(np.float32))
    return mean, deviation


def encode_clip(codec: Codec, reader: Reader, clip: int) -> dict[str, np.ndarray]:
    """Both persons' latents of a clip: person -> (frames, latent) float16."""
    return _encode(codec, _read_persons(reader, codec.inputs, clip))


def _read_persons(reader: Reader, names: Sequence[str], clip: int) -> dict[str, np.ndarray]:
    """What is encoded of a clip: stream -> (persons, frames, width)."""
    read = reader.read(clip, [(person, name) for person in PERSONS for name in names])
    return {name: np.stack([read.arrays[person, name] for person in PERSONS]) for name in names}


def _encode(codec: Codec, streams: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two persons at once, always: the last bits of a product depend on how many rows it has, and names of latents on their bits."""
    with torch.no_grad():
        latents = codec.encode({name: torch.from_numpy(array).to(codec.device) for name, array in streams.items()}).float().cpu().numpy()
    return {person: latent.astype(np.float16) for person, latent in zip(PERSONS, latents, strict=True)}


@dataclass(frozen=True)
class EncodedShard:
    """A shard of latents: what its `done` record says.

    Attributes:
        info: what the manifest keeps of it.
        corrupt: clip of the split -> why it could not be encoded: its latents are zeros.
        number: what the manifest names it by within its split.
        range: file with the range of its latents, (2, frames, latent) of minimum and maximum.
        sums: file with their number, sum and sum of squares over frames, (3, latent) float64; empty in an older record.
    """

    info: ShardInfo
    corrupt: dict[int, str]
    number: int | str
    range: str
    sums: str = ""

    def encode(self) -> bytes:
        """The record as JSON."""
        values = asdict(self.info) | {"number": self.number, RANGE: self.range, "sums": self.sums}
        return json.dumps(values | ({CORRUPT: list(self.corrupt.items())} if self.corrupt else {})).encode()

    @classmethod
    def decode(cls, data: bytes, source: str, number: int | str) -> "EncodedShard":
        """The record that `encode` wrote; one of a time when names carried no hash has none, and means those of the source's shard."""
        values = json.loads(data)
        corrupt, number = dict(values.pop(CORRUPT, [])), values.pop("number", number)
        bounds, sums = values.pop(RANGE, f"{source}.range.npy"), values.pop("sums", "")
        return cls(ShardInfo(**values), corrupt, number, bounds, sums)


def encode_shard(latents: LatentDataset, split: str, position: int) -> EncodedShard:
    """Encode one shard, unless that is done; of all that encode it at the same time the first to say so decides what it is.

    Raises:
        CorruptData: if bytes of a clip are damaged and `latents.on_corrupt` is "stop", or the shard's index is.
    """
    target, name = latents.store, latents.clips.shard(split, position)
    number, record = latents.clips.split(split).shards.number[position], f"{name}.done.json"
    try:
        return EncodedShard.decode(target.read(record), name, number)
    except NotFound:
        pass
    make_deterministic(THREADS)
    codec, reader = latents.codec, Reader(latents.dataset, latents.clips, split)
    first = int(reader.counts[:position].sum())
    clips: list[Clip] = []
    corrupt, bounds, sums = {}, empty_range(latents), np.zeros((3, latents.width))
    numbers = range(first, first + int(reader.counts[position]))
    for clip, read in zip(numbers, _read_ahead(reader, codec.inputs, numbers), strict=True):
        alive()
        key = reader.key(clip)
        if isinstance(read, CorruptData):
            if latents.on_corrupt == "stop":
                raise read
            log.error("QUARANTINED: clip %d of split %s has no latents: %s", clip, split, read)
            encoded = dict.fromkeys(PERSONS, np.zeros((latents.clips.frames, latents.width), np.float16))
            corrupt[clip] = str(read)
        else:
            encoded = _encode(codec, read)
            both = np.stack(list(encoded.values()))
            bounds = range_union(bounds, np.stack((both.min(axis=0), both.max(axis=0))))
            sums += _sums(both)
        clips.append(Clip(key, {person: _parted(encoding, latents.parts) for person, encoding in encoded.items()}))
    info, limits, moments = upload_shard(target, name, clips, latents.parts, hashed=True), encode_npy(bounds), encode_npy(sums)
    files = f"{name}-{content_hash(limits)}.range.npy", f"{name}-{content_hash(moments)}.sums.npy"
    shard = EncodedShard(info, corrupt, hashed_name(name, info).removeprefix(f"{split}/"), *files)
    target.put(shard.range, limits)
    target.put(shard.sums, moments)
    try:
        target.create(record, shard.encode())
        return shard
    except AlreadyExists:
        return EncodedShard.decode(target.read(record), name, number)


def _read_ahead(reader: Reader, names: Sequence[str], clips: range) -> Iterator[dict[str, np.ndarray] | CorruptData]:
    """What is encoded of each clip, or how it is damaged; while one is encoded, the next ones are read."""

    def read(clip: int) -> dict[str, np.ndarray] | CorruptData:
        try:
            return _read_persons(reader, names, clip)
        except CorruptData as error:
            return error

    arrays = [reader.array((person, name)) for person in PERSONS for name in names]
    size = sum(dtype.itemsize * frames * width for (frames, width), dtype in arrays)
    return parallel_map(read, clips, ahead=max(1, min(MOST_AHEAD, READ_AHEAD // size)))


def _parted(encoding: np.ndarray, parts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """An encoding (frames, width) as an array for each of its parts."""
    return dict(zip(parts, np.split(encoding, np.cumsum(list(parts.values()))[:-1], axis=1), strict=True))


def _sums(encodings: np.ndarray) -> np.ndarray:
    """Number, sum and sum of squares over persons and frames, (persons, frames, latent) -> (3, latent) float64."""
    rows = encodings.astype(np.float64).reshape(-1, encodings.shape[-1])
    return np.stack((np.full(rows.shape[1], len(rows)), rows.sum(axis=0), np.square(rows).sum(axis=0)))


def empty_range(latents: LatentDataset) -> np.ndarray:
    """The range of no latents at all, (2, frames, latent) of minimum and maximum."""
    return np.stack([np.full((latents.clips.frames, latents.width), end, np.float16) for end in (np.inf, -np.inf)])


def range_union(bounds: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest range that holds both, each (2, frames, latent) of minimum and maximum."""
    return np.stack((np.minimum(bounds[0], other[0]), np.maximum(bounds[1], other[1])))
