"""World-size-free checkpoints, written whole or not at all, and exports made from them.

Below `checkpoints/<stage>/`: content-hashed safetensors parts first, one a rank, each holding that rank's fragments of the
fp32 weights, Adam's moments and the averaged weights; then `<progress>-<life>.json`, created last. Without that manifest
there is no checkpoint. Any number of ranks at any ZeRO stage writes and reads the same format.
"""

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from safetensors.torch import load, save

from cluster.data.quarantine import BadItem
from cluster.storage import AlreadyExists, NotFound, Store, content_hash
from cluster.storage.hashing import HashMismatch, read_verified

VERSION = 1
BUFFER = "buffer/"
log = logging.getLogger(__name__)

Read = Callable[[str, int, int], dict[str, torch.Tensor]]
Extent = tuple[str, int, int]
"""(parameter name, first element, count)."""


class DamagedCheckpoint(RuntimeError):
    """A part of a checkpoint is missing or is not what its manifest says."""


@dataclass(frozen=True)
class CheckpointPart:
    """One rank's file: its content hash, size and the stretches of parameters in it."""

    hash: str
    bytes: int
    extents: list[Extent]

    @property
    def file(self) -> str:
        """Its place below `checkpoints/<stage>/`."""
        return f"parts/{self.hash}.safetensors"


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
    version: int = VERSION

    @property
    def file(self) -> str:
        """The manifest's place below `checkpoints/<stage>/`."""
        return f"{self.progress:015d}-{self.life:06d}.json"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Checkpoint":
        """Read a manifest.

        Raises:
            DamagedCheckpoint: if it is no manifest of a version this program knows.
        """
        try:
            values = json.loads(data)
            if values["version"] != VERSION:
                raise DamagedCheckpoint(f"{where} has version {values['version']}, this program reads version {VERSION}")
            parts = [
                CheckpointPart(part["hash"], part["bytes"], [tuple(extent) for extent in part["extents"]]) for part in values.pop("parts")
            ]
            quarantine = [BadItem(*entry) for entry in values.pop("quarantine")]
            return cls(parts=parts, quarantine=quarantine, **values)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{where} is no checkpoint manifest: {error}") from None


def list_checkpoints(store: Store, stage: str) -> list[str]:
    """The manifests of a stage, newest first (by progress, then life)."""
    names = [entry.key for entry in store.list(f"checkpoints/{stage}/") if entry.key.endswith(".json")]
    return sorted(names, reverse=True)


def newest_progress(store: Store, stage: str) -> int:
    """Progress of the newest checkpoint of a stage, whole or not; 0 where there is none."""
    names = list_checkpoints(store, stage)
    return int(names[0].rpartition("/")[2].partition("-")[0]) if names else 0


def read_manifest(store: Store, key: str) -> Checkpoint:
    """The checkpoint described by one key of `list_checkpoints`.

    Raises:
        DamagedCheckpoint: as `Checkpoint.from_json`, or if it is gone: a life that is over deletes old ones until it notices.
    """
    try:
        return Checkpoint.from_json(store.read(key), f"{store.url}/{key}")
    except NotFound:
        raise DamagedCheckpoint(f"{store.url}/{key} is gone since the checkpoints were listed") from None


def read_part(store: Store, stage: str, part: CheckpointPart) -> dict[str, torch.Tensor]:
    """The tensors of a part, verified against its hash.

    Raises:
        DamagedCheckpoint: if the part is missing or its bytes have another hash.
    """
    key = f"checkpoints/{stage}/{part.file}"
    try:
        return load(read_verified(store, key, part.hash))
    except NotFound:
        raise DamagedCheckpoint(f"{store.url}/{key} is missing") from None
    except HashMismatch as error:
        raise DamagedCheckpoint(str(error)) from None


def reader(store: Store, checkpoint: Checkpoint, extents: Iterable[Extent]) -> Read:
    """Read what covers these stretches; a part that overlaps none of them is not touched.

    Returns:
        (name, start, count) -> kind -> (count,) fp32, for `Engine.restore`.

    Raises:
        DamagedCheckpoint: if a part is damaged or the stretches are not covered.
    """
    wanted: dict[str, list[tuple[int, int, dict[str, torch.Tensor]]]] = {}
    for name, start, count in extents:
        wanted.setdefault(name, []).append((start, count, {}))
    missing = sum(count for stretches in wanted.values() for _, count, _ in stretches)
    for part in checkpoint.parts:
        if not any(s < at + n and at < s + c for name, at, n in part.extents for s, c, _ in wanted.get(name, [])):
            continue
        tensors = read_part(store, checkpoint.stage, part)
        for name, at, n in part.extents:
            for start, count, kinds in wanted.get(name, []):
                low, high = max(start, at), min(start + count, at + n)
                if low < high:
                    missing -= high - low
                    for kind in _kinds(tensors, name, at):
                        into = kinds.setdefault(kind, torch.zeros(count))
                        into[low - start : high - start] = tensors[_tensor(name, at, kind)][low - at : high - at]
    if missing:
        where = f"{store.url}/checkpoints/{checkpoint.stage}/{checkpoint.file}"
        raise DamagedCheckpoint(f"{where} leaves {missing} weights of this model uncovered")
    return lambda name, start, count: next(kinds for s, c, kinds in wanted[name] if (s, c) == (start, count))


def assemble(store: Store, checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """All weights of one kind ("average" for evaluation, "master" for the trained ones), in the model's shapes, and its buffers."""
    flat = {name: torch.empty(prod(shape)) for name, shape in checkpoint.shapes.items()}
    buffers: dict[str, torch.Tensor] = {}
    for part in checkpoint.parts:
        tensors = read_part(store, checkpoint.stage, part)
        for name, start, count in part.extents:
            flat[name][start : start + count] = tensors[_tensor(name, start, kind)]
        buffers |= {key.removeprefix(BUFFER): tensor for key, tensor in tensors.items() if key.startswith(BUFFER)}
    return {name: flat[name].view(*shape) for name, shape in checkpoint.shapes.items()} | buffers


class CheckpointWriter:
    """Writes this rank's parts while training goes on; all ranks call every method at the same step.

    Args:
        store: the run's folder.
        gather: collects one object of every rank on all of them.
        rank: this rank; rank 0 writes the manifest.
        keep: checkpoints kept of each stage.
        superseded: raises if a newer life owns the run; asked before each manifest.
    """

    def __init__(self, store: Store, gather: Callable[[Any], list[Any]], rank: int, keep: int, superseded: Callable[[], None]):
        self._store, self._gather, self._rank, self._keep, self._superseded = store, gather, rank, keep, superseded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[CheckpointPart] | None = None
        self._facts: dict[str, Any] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not yet committed."""
        return self._upload is not None

    @property
    def uploaded(self) -> bool:
        """Whether this rank's part is uploaded. Raises what the upload raised."""
        if self._upload is not None and self._upload.done():
            self._upload.result()
            return True
        return False

    def begin(self, fragments: Iterable[Any], buffers: dict[str, torch.Tensor], **facts: Any) -> None:
        """Copy this rank's fragments and start to upload them.

        Args:
            fragments: of the engine (`Engine.fragments`).
            buffers: the module's buffers (latent statistics), equal on all ranks.
            facts: the fields of `Checkpoint` but shapes and parts.
        """
        if self.busy:
            self.commit()
        extents, shapes = [], {}
        tensors = {BUFFER + name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()} if self._rank == 0 else {}
        for fragment in fragments:
            count = fragment.tensors["master"].numel()
            extents.append((fragment.name, fragment.start, count))
            shapes[fragment.name] = list(fragment.shape)
            for kind, view in fragment.tensors.items():
                tensors[_tensor(fragment.name, fragment.start, kind)] = view.detach().to("cpu", torch.float32, copy=True)
        self._facts = {**facts, "shapes": shapes}
        self._upload = self._pool.submit(self._write, str(facts["stage"]), tensors, extents)

    def commit(self) -> Checkpoint:
        """Wait for every rank's part, then let rank 0 create the manifest; the checkpoint, which exists when rank 0 returns."""
        assert self._upload is not None
        ranks = self._gather((self._upload.result(), self._facts["shapes"]))
        self._upload = None
        shapes = {name: shape for _, shapes in ranks for name, shape in shapes.items()}
        checkpoint = Checkpoint(**{**self._facts, "shapes": shapes, "parts": [part for part, _ in ranks]})
        if self._rank == 0:
            self._superseded()
            try:
                self._store.create(f"checkpoints/{checkpoint.stage}/{checkpoint.file}", json.dumps(asdict(checkpoint)).encode())
            except AlreadyExists:
                log.warning("checkpoint %s of this life exists already", checkpoint.file)
            _prune(self._store, checkpoint.stage, self._keep)
        return checkpoint

    def close(self) -> None:
        """Let go of the upload thread; a checkpoint that was not committed does not exist."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, stage: str, tensors: dict[str, torch.Tensor], extents: list[Extent]) -> CheckpointPart:
        data = save(tensors)
        part = CheckpointPart(content_hash(data), len(data), extents)
        self._store.put(f"checkpoints/{stage}/{part.file}", data)
        return part


def remove_orphans(store: Store, stage: str) -> None:
    """Delete the parts that no manifest names: what lives that died left behind. Only for the newest life, before it writes its own.

    Nothing is deleted while a manifest cannot be read: who knows what it names.
    """
    try:
        name_fields = _named(store, stage, list_checkpoints(store, stage))
    except DamagedCheckpoint:
        return
    for entry in list(store.list(f"checkpoints/{stage}/parts/")):
        if entry.key not in name_fields:
            store.delete(entry.key)


def _prune(store: Store, stage: str, keep: int) -> None:
    """Delete all but the newest manifests, then the parts that only they named.

    Other parts that no manifest names stay: they may be of the next checkpoint, which other ranks upload already.
    """
    names = list_checkpoints(store, stage)
    try:
        parts = sorted(_named(store, stage, names[keep:]) - _named(store, stage, names[:keep]))
    except DamagedCheckpoint as error:
        log.error("CHECKPOINT DAMAGED, so no parts of old ones are deleted: %s", error)
        parts = []
    for key in [*names[keep:], *parts]:
        store.delete(key)


def _named(store: Store, stage: str, names: Iterable[str]) -> set[str]:
    """The parts that these manifests name."""
    return {f"checkpoints/{stage}/{part.file}" for name in names for part in read_manifest(store, name).parts}


def _tensor(name: str, start: int, kind: str) -> str:
    return f"{name}@{start}/{kind}"


def _kinds(tensors: dict[str, torch.Tensor], name: str, start: int) -> list[str]:
    prefix = _tensor(name, start, "")
    return [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
