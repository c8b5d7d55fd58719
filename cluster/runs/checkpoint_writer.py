"""Writes a rank's part of each checkpoint while training goes on, and the manifest when all parts are there."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from cluster.runs.checkpoint import BUFFER, Checkpoint, CheckpointPart, Extent, read_manifest
from cluster.runs.inventory import prune
from cluster.runs.retention import Retention
from cluster.runs.snapshot import TensorSnapshot
from cluster.runs.state import Attempt
from cluster.storage import AlreadyExists, StorageError, Store, content_hash


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
        self._write_rows: Callable[[], None] | None = None
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

    def begin(
        self, fragments: Iterable[Any], buffers: dict[str, torch.Tensor], write_rows: Callable[[], None] | None = None, **facts: Any
    ) -> None:
        """Copy this rank's fragments and start to upload them.

        Args:
            fragments: of the engine (`Engine.fragments`).
            buffers: the module's buffers (latent statistics), equal on all ranks.
            write_rows: of rank 0: writes the rows of the steps up to here. They are there before the manifest is.
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
        self._facts, self._write_rows = {**facts, "shapes": shapes}, write_rows
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
            self._manifest = self._pool.submit(self._create, self._published, self._write_rows)

    def finish(self) -> Checkpoint:
        """The checkpoint that was published; on rank 0 it exists when this returns.

        Raises:
            Superseded: on rank 0, if a newer life or attempt has begun. Then it counts only if that one goes on from it.
            StorageError: if another group with the same numbers has created this manifest, of other parts.
        """
        assert self._published is not None
        if self._manifest:
            self._manifest.result()
            if not _done(self._cleaning) and self._cleaning:
                self._cleaning.cancel()  # one that has not begun yet would do nothing that the next one does not do
            self._cleaning = self._cleaner.submit(prune, self._store, self._published, self._keep, self._superseded)
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

    def _create(self, checkpoint: Checkpoint, write_rows: Callable[[], None] | None) -> None:
        """Create the manifest; a newer life or attempt that began meanwhile ends this one: this process may have stood still.

        It stays then: if the newer one has found it in time, it goes on from it, and if not, it counts for nobody.
        """
        self._superseded()
        if write_rows:
            write_rows()
        key = f"checkpoints/{checkpoint.stage}/{checkpoint.file}"
        try:
            self._store.create(key, json.dumps(asdict(checkpoint)).encode())
        except AlreadyExists:
            if read_manifest(self._store, key).parts != checkpoint.parts:
                raise StorageError(
                    f"{self._store.url}/{key} was created with other parts by another group with the same numbers; "
                    "the next attempt has numbers of its own"
                ) from None
        self._superseded()

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


def _tensor(name: str, start: int, kind: str) -> str:
    return f"{name}@{start}/{kind}"
