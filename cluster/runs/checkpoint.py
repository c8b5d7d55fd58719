"""World-size-free checkpoints: their format, and how they are read.

Below `checkpoints/<stage>/`: content-hashed safetensors parts first, one a rank, each holding that rank's fragments of the
fp32 weights, Adam's moments and the averaged weights; then `<progress>-<life>.<attempt>.json`, created last. Without that
manifest there is no checkpoint. Any number of ranks at any ZeRO stage writes and reads the same format. Parts have the attempt that
wrote them in their names too, so an attempt that was given up and wakes can neither write nor delete what its successor needs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch

from cluster.data.quarantine import BadItem
from cluster.runs.lineage import counting, is_manifest, written_by
from cluster.runs.snapshot import Stretch, TensorsInPlace
from cluster.runs.state import Attempt
from cluster.storage import NotFound, Store
from cluster.storage.hashing import HashMismatch, stream_verified

VERSION = 2
READ = (1, 2)
"""Versions that this program reads. In version 1 no attempt was named."""

BUFFER = "buffer/"
"""Before the names of buffers in a part."""

Extent = tuple[str, int, int]
"""(parameter name, first element, count)."""


class Target(NamedTuple):
    """Where a stretch of a parameter belongs: its name, its first element in the flattened parameter, and kind -> (count,) fp32."""

    name: str
    start: int
    views: Mapping[str, torch.Tensor]

    @property
    def end(self) -> int:
        """One after its last element."""
        return self.start + next(iter(self.views.values())).numel()


class DamagedCheckpoint(RuntimeError):
    """A part of a checkpoint is missing or is not what its manifest says; another checkpoint may do."""

    failure = "storage"


class GoneCheckpoint(DamagedCheckpoint):
    """A manifest was deleted since it was listed: by an attempt that had too many."""


class OtherVersion(ValueError):
    """A checkpoint that another version of this program wrote; it is whole for all this one knows."""


@dataclass(frozen=True)
class CheckpointPart:
    """One rank's file: its content hash, size, the stretches of parameters in it, and the attempt that wrote it ("" in version 1)."""

    hash: str
    bytes: int
    extents: list[Extent]
    attempt: str = ""

    @property
    def file(self) -> str:
        """Its place below `checkpoints/<stage>/`."""
        return f"parts/{self.attempt}{'-' if self.attempt else ''}{self.hash}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a manifest says; progress counts items consumed by the optimiser."""

    stage: str
    progress: int
    steps: int
    life: int
    dataset: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    parts: list[CheckpointPart]
    quarantine: list[BadItem] = field(default_factory=list)
    attempt: int = 0
    version: int = VERSION

    @property
    def by(self) -> Attempt:
        """Who wrote it."""
        return Attempt(self.life, self.attempt)

    @property
    def sizes(self) -> dict[str, int]:
        """The keys of its parts, and their bytes."""
        return {f"checkpoints/{self.stage}/{part.file}": part.bytes for part in self.parts}

    @property
    def file(self) -> str:
        """The manifest's place below `checkpoints/<stage>/`."""
        return f"{self.progress:015d}-{self.life:06d}.json" if self.version == 1 else f"{self.progress:015d}-{self.by}.json"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Checkpoint":
        """Read a manifest.

        Raises:
            DamagedCheckpoint: if it is no manifest.
            OtherVersion: if it is one of a version that this program does not know.
        """
        try:
            values = json.loads(data)
            if values["version"] not in READ:
                raise OtherVersion(
                    f"{where} has version {values['version']}, this program reads {' and '.join(map(str, READ))}: go on with the newer "
                    "program that wrote it, or give this one a run of another name (run.name)"
                )
            parts = [CheckpointPart(**{**part, "extents": [tuple(extent) for extent in part["extents"]]}) for part in values.pop("parts")]
            quarantine = [BadItem(*entry) for entry in values.pop("quarantine")]
            return cls(parts=parts, quarantine=quarantine, **values)
        except OtherVersion:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{where} is no checkpoint manifest: {error}") from None


def list_checkpoints(store: Store, stage: str) -> list[str]:
    """The manifests of a stage that count (`cluster/runs/lineage.py`), by progress, then by who wrote them, newest first."""
    found = filter(counting(store), (entry.key for entry in store.list(f"checkpoints/{stage}/") if is_manifest(entry.key)))
    return sorted(found, key=lambda key: (key.rpartition("/")[2].partition("-")[0], written_by(key)), reverse=True)


def newest_progress(store: Store, stage: str) -> int:
    """Progress of the newest checkpoint of a stage, whole or not; 0 where there is none."""
    names = list_checkpoints(store, stage)
    return progress_of(names[0]) if names else 0


def read_manifest(store: Store, key: str) -> Checkpoint:
    """The checkpoint described by one key of `list_checkpoints`.

    Raises:
        GoneCheckpoint: if it is not there any more: a life that is over deletes old ones until it notices.
        DamagedCheckpoint: as `Checkpoint.from_json`.
        OtherVersion: as `Checkpoint.from_json`.
    """
    try:
        return Checkpoint.from_json(store.read(key), f"{store.url}/{key}")
    except NotFound:
        raise GoneCheckpoint(f"{store.url}/{key} is gone since the checkpoints were listed") from None


def load_into(store: Store, checkpoint: Checkpoint, stretches: Sequence[Target]) -> dict[str, torch.Tensor]:
    """Fill stretches of parameters with what a checkpoint has of them; a part that overlaps none of them is not touched.

    Parts come in pieces, each straight to where it belongs: nothing is in memory twice. Where this raises, what is there is undefined.

    Returns:
        The buffers that were in the parts that were read.

    Raises:
        DamagedCheckpoint: if a part is missing or damaged, or the stretches are not covered.
    """
    wanted: dict[str, list[Target]] = {}
    for target in stretches:
        wanted.setdefault(target.name, []).append(target)
    missing = sum(view.numel() for target in stretches for view in target.views.values())
    buffers: dict[str, torch.Tensor] = {}

    def places(name: str, dtype: torch.dtype, shape: list[int]) -> Iterator[Stretch]:
        if name.startswith(BUFFER):
            buffer = buffers[name.removeprefix(BUFFER)] = torch.empty(shape, dtype=dtype)
            yield 0, buffer
            return
        stretch, _, kind = name.rpartition("/")
        parameter, _, at = stretch.rpartition("@")
        for target in wanted.get(parameter, ()):
            low, high = max(target.start, int(at)), min(target.end, int(at) + prod(shape))
            if low < high and kind in target.views:
                yield low - int(at), target.views[kind][low - target.start : high - target.start]

    for part in checkpoint.parts:
        if not any(t.start < at + n and at < t.end for name, at, n in part.extents for t in wanted.get(name, ())):
            continue
        key, into = f"checkpoints/{checkpoint.stage}/{part.file}", TensorsInPlace(places)
        try:
            stream_verified(store, key, part.hash, into.take)
        except NotFound:
            raise DamagedCheckpoint(f"{store.url}/{key} is missing") from None
        except HashMismatch as error:
            raise DamagedCheckpoint(str(error)) from None
        missing -= into.count
    missing += sum(buffer.numel() for buffer in buffers.values())
    if missing:
        where = f"{store.url}/checkpoints/{checkpoint.stage}/{checkpoint.file}"
        raise DamagedCheckpoint(f"{where} leaves {missing} weights of this model uncovered")
    return buffers


def assemble(store: Store, checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """All weights of one kind ("average" for evaluation, "master" for the trained ones), in the model's shapes, and its buffers.

    Raises:
        DamagedCheckpoint: as `load_into`.
    """
    flat = {name: torch.empty(prod(shape)) for name, shape in checkpoint.shapes.items()}
    buffers = load_into(store, checkpoint, [Target(name, 0, {kind: whole}) for name, whole in flat.items()])
    return {name: flat[name].view(*shape) for name, shape in checkpoint.shapes.items()} | buffers


def progress_of(key: str) -> int:
    """What the name of a manifest says; 0 where it says nothing."""
    digits = key.rpartition("/")[2].partition("-")[0]
    return int(digits) if digits.isdecimal() else 0
