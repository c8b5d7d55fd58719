"""World-size-free checkpoints, written whole or not at all, and exports made from them.

Below `checkpoints/<stage>/`: content-hashed safetensors parts first, one a rank, each holding that rank's fragments of the
fp32 weights, Adam's moments and the averaged weights; then `<progress>-<life>.<attempt>.json`, created last. Without that
manifest there is no checkpoint. Any number of ranks at any ZeRO stage writes and reads the same format. Parts have the attempt that
wrote them in their names too, so an attempt that was given up and wakes can neither write nor delete what its successor needs.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch

from cluster.data.quarantine import BadItem
from cluster.runs.lineage import counting, is_manifest, written_by
from cluster.runs.retention import Retention, StoredCheckpoint, checkpoint_scores
from cluster.runs.snapshot import Stretch, TensorsInPlace, TensorSnapshot
from cluster.runs.state import Attempt, Superseded
from cluster.storage import AlreadyExists, NotFound, StorageError, Store, content_hash
from cluster.storage.hashing import HashMismatch, stream_verified
from cluster.storage.parallel import parallel_map

VERSION = 2
READ = (1, 2)
"""Versions that this program reads. In version 1 no attempt was named."""

BUFFER = "buffer/"
log = logging.getLogger(__name__)

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
    """A part of a checkpoint is missing or is not what its manifest says."""


class GoneCheckpoint(DamagedCheckpoint):
    """A manifest was deleted since it was listed: by an attempt that took it back, or had too many."""


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
    return _progress(names[0]) if names else 0


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


class CheckpointWriter:
    """Writes this rank's parts while training goes on; all ranks call every method at the same step.

    A checkpoint is begun (a copy in memory, whose upload starts), published when all ranks have uploaded (rank 0 starts to write the
    manifest), and finished when the manifest is there. Between these three, each at a step of its own, nobody waits for the store.

    Args:
        store: the run's folder.
        gather: collects one object of every rank on all of them.
        rank: this rank; rank 0 writes the manifest.
        keep: which checkpoints stay.
        superseded: raises `Superseded` if a newer life or attempt has begun; asked before and after each manifest is created.
    """

    def __init__(self, store: Store, gather: Callable[[Any], list[Any]], rank: int, keep: Retention, superseded: Callable[[], None]):
        self._store, self._gather, self._rank, self._keep, self._superseded = store, gather, rank, keep, superseded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="prune")
        self._snapshot = TensorSnapshot()
        self._room: Future[None] | None = None
        self._upload: Future[CheckpointPart] | None = None
        self._manifest: Future[None] | None = None
        self._cleaning: Future[None] | None = None
        self._published: Checkpoint | None = None
        self._facts: dict[str, Any] = {}
        self._extents: list[Extent] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint was begun and not yet finished."""
        return self._upload is not None or self._published is not None

    @property
    def uploaded(self) -> bool:
        """Whether this rank's part is uploaded and waits to be published. Raises what the upload raised."""
        return _done(self._upload)

    @property
    def written(self) -> bool:
        """Whether the manifest is there; only rank 0 knows. Raises what `finish` would."""
        return _done(self._manifest)

    def prepare(self, fragments: Iterable[Any], buffers: dict[str, torch.Tensor]) -> "Future[None]":
        """Start to get the memory for the copies, so that the first checkpoint need not wait for it; returns what ends with that.

        Args:
            fragments: as `begin`.
            buffers: as `begin`.
        """
        self._room = self._pool.submit(self._snapshot.prepare, self._tensors(fragments, buffers))
        return self._room

    def begin(self, fragments: Iterable[Any], buffers: dict[str, torch.Tensor], **facts: Any) -> None:
        """Copy this rank's fragments and start to upload them.

        Args:
            fragments: of the engine (`Engine.fragments`).
            buffers: the module's buffers (latent statistics), equal on all ranks.
            facts: the fields of `Checkpoint` but shapes and parts.
        """
        if self.busy:
            self.commit()
        if self._room:
            self._room.result()
            self._room = None
        fragments = list(fragments)
        shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
        self._extents = [(fragment.name, fragment.start, fragment.tensors["master"].numel()) for fragment in fragments]
        self._facts = {**facts, "shapes": shapes}
        by = str(Attempt(facts["life"], facts.get("attempt", 0)))
        data = self._snapshot.take(self._tensors(fragments, buffers))
        self._upload = self._pool.submit(self._write, str(facts["stage"]), by, data, self._extents)

    def begun(self, kind: str) -> list[tuple[str, int, torch.Tensor]]:
        """This rank's stretches of what was begun last, of one kind: (parameter name, first element, elements), until the next begins."""
        return [(name, start, self._snapshot.view(_tensor(name, start, kind))) for name, start, _ in self._extents]

    def publish(self) -> None:
        """Wait for every rank's part, then let rank 0 begin to write the manifest."""
        assert self._upload is not None
        ranks = self._gather((self._upload.result(), self._facts["shapes"]))
        self._upload = None
        shapes = {name: shape for _, shapes in ranks for name, shape in shapes.items()}
        self._published = Checkpoint(**{**self._facts, "shapes": shapes, "parts": [part for part, _ in ranks]})
        if self._rank == 0:
            self._manifest = self._pool.submit(self._create, self._published)

    def finish(self) -> Checkpoint:
        """The checkpoint that was published; on rank 0 it exists when this returns.

        Raises:
            Superseded: on rank 0, if a newer life or attempt has begun. Then there is no such checkpoint.
            StorageError: if another group with the same numbers has created this manifest, of other parts.
        """
        assert self._published is not None
        if self._manifest:
            self._manifest.result()
            if not _done(self._cleaning) and self._cleaning:
                self._cleaning.cancel()  # one that has not begun yet would do nothing that the next one does not do
            self._cleaning = self._cleaner.submit(_prune, self._store, self._published, self._keep, self._superseded)
        checkpoint, self._published, self._manifest = self._published, None, None
        return checkpoint

    def commit(self) -> Checkpoint:
        """Wait until what was begun is published and finished.

        Raises:
            Superseded, StorageError: as `finish`.
        """
        if self._published is None:
            self.publish()
        return self.finish()

    def _tensors(self, fragments: Iterable[Any], buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this rank's part holds, by name."""
        tensors = {BUFFER + name: buffer for name, buffer in buffers.items()} if self._rank == 0 else {}
        for fragment in fragments:
            tensors |= {_tensor(fragment.name, fragment.start, kind): view for kind, view in fragment.tensors.items()}
        return tensors

    def _create(self, checkpoint: Checkpoint) -> None:
        """Create the manifest, and take it back if a newer life or attempt began meanwhile: this process may have stood still."""
        self._superseded()
        key = f"checkpoints/{checkpoint.stage}/{checkpoint.file}"
        try:
            self._store.create(key, json.dumps(asdict(checkpoint)).encode())
        except AlreadyExists:
            if read_manifest(self._store, key).parts != checkpoint.parts:
                raise StorageError(
                    f"{self._store.url}/{key} was created with other parts by another group with the same numbers; "
                    "the next attempt has numbers of its own"
                ) from None
        try:
            self._superseded()
        except Superseded:
            self._store.delete(key)
            raise

    def close(self) -> None:
        """Wait for deletions, and let go of the threads; a checkpoint that was not finished does not exist."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._cleaner.shutdown(wait=True)
        _done(self._cleaning)

    def _write(self, stage: str, by: str, data: memoryview, extents: list[Extent]) -> CheckpointPart:
        part = CheckpointPart(content_hash(data), len(data), extents, by)
        self._store.put(f"checkpoints/{stage}/{part.file}", data)
        return part


def _done(future: "Future[Any] | None") -> bool:
    """Whether it has ended; raises what it raised."""
    if future is None or not future.done():
        return False
    future.result()
    return True


class Inventory:
    """What lies below `checkpoints/<stage>/`, as it is listed now.

    Args:
        store: the run's folder.
        stage: whose checkpoints.
        of: the attempt to which they count or not; the newest one if it is None.
        scores: progress -> score.

    Attributes:
        sizes: of all objects, by key.
        found: the checkpoints, in the order of their keys.
    """

    def __init__(self, store: Store, stage: str, of: Attempt | None = None, scores: Mapping[int, float] | None = None):
        self._store, self._scores = store, scores or {}
        self.sizes = {entry.key: entry.size for entry in store.list(f"checkpoints/{stage}/")}
        self._counts = counting(store, of)
        read = parallel_map(self._read, [key for key in self.sizes if is_manifest(key)])
        self.found = [one for one in read if one is not None]

    def _read(self, key: str) -> StoredCheckpoint | None:
        about = StoredCheckpoint(key, _progress(key), written_by(key), self._counts(key))
        try:
            sizes = read_manifest(self._store, key).sizes
        except GoneCheckpoint:
            return None
        except (DamagedCheckpoint, OtherVersion) as error:
            return replace(about, wrong=str(error), readable=False, foreign=isinstance(error, OtherVersion))
        lacking = [part for part, size in sizes.items() if self.sizes.get(part) != size]
        wrong = f"{len(lacking)} of {len(sizes)} parts are missing or cut short, the first is {lacking[0]}" if lacking else ""
        return replace(about, parts=frozenset(sizes), bytes=sum(sizes.values()), wrong=wrong, score=self._scores.get(about.progress))

    def orphans(self, by: Attempt) -> list[str]:
        """What attempts before this one left behind: manifests that do not count, and parts that no other one names.

        No part is one while a manifest cannot be read: who knows what it names.
        """
        manifests = [one.key for one in self.found if one.readable and not one.counts and one.by < by]
        if not all(one.readable for one in self.found):
            return manifests
        named = frozenset[str]().union(*(one.parts for one in self.found if one.key not in manifests))
        return manifests + [key for key in self.sizes if not is_manifest(key) and written_by(key) < by and key not in named]

    def excess(self, by: Attempt, keep: Retention, committed: str = "") -> list[str]:
        """Checkpoints, of this attempt and those before it, that need not stay, and parts that only these name.

        Other parts that no manifest names are no excess: they may be of the next checkpoint, which other ranks upload already.

        Args:
            by: what a newer attempt wrote is none of its business.
            keep: which stay.
            committed: key of the manifest that was just created.
        """
        mine = [one for one in self.found if one.by <= by]
        why = keep.kept(mine, committed)
        old = [one for one in mine if one.key not in why]
        named = frozenset[str]().union(*(one.parts for one in mine if one.key in why))
        sure = all(one.readable for one in mine if one.key in why)
        return [one.key for one in old] + (sorted(frozenset[str]().union(*(one.parts for one in old)) - named) if sure else [])


def delete_objects(store: Store, keys: Iterable[str]) -> None:
    """Delete manifests, then parts: a checkpoint whose deletion is broken off is none any more, and its parts are orphans."""
    given = list(keys)
    for manifests in (True, False):
        for _ in parallel_map(store.delete, [key for key in given if is_manifest(key) == manifests]):
            pass


def remove_orphans(store: Store, stage: str, by: Attempt) -> None:
    """Delete what attempts before this one left behind (`Inventory.orphans`)."""
    delete_objects(store, Inventory(store, stage, by).orphans(by))


def _prune(store: Store, committed: Checkpoint, keep: Retention, superseded: Callable[[], None]) -> None:
    """Delete the checkpoints that need not stay, now that there is this one."""
    scores = checkpoint_scores(store, committed.stage) if keep.best else None
    there = Inventory(store, committed.stage, committed.by, scores)
    for one in there.found:
        if one.by <= committed.by and not (one.readable or one.foreign):
            log.error("CHECKPOINT DAMAGED, it counts for none of those that are kept: %s", one.wrong)
    excess = there.excess(committed.by, keep, f"checkpoints/{committed.stage}/{committed.file}")
    superseded()
    delete_objects(store, excess)


def _progress(key: str) -> int:
    """What the name of a manifest says; 0 where it says nothing."""
    digits = key.rpartition("/")[2].partition("-")[0]
    return int(digits) if digits.isdecimal() else 0


def _tensor(name: str, start: int, kind: str) -> str:
    return f"{name}@{start}/{kind}"
