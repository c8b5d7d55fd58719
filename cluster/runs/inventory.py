"""What checkpoints of a stage there are, whole or not; and the deletion of those that are no checkpoints, or too many."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from cluster.runs.checkpoint import Checkpoint, DamagedCheckpoint, GoneCheckpoint, OtherVersion, progress_of, read_manifest
from cluster.runs.lineage import counting, is_manifest, written_by
from cluster.runs.retention import Retention, StoredCheckpoint, checkpoint_scores
from cluster.runs.state import Attempt
from cluster.storage import Store
from cluster.storage.parallel import parallel_map

log = logging.getLogger(__name__)


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
        about = StoredCheckpoint(key, progress_of(key), written_by(key), self._counts(key))
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


def prune(store: Store, committed: Checkpoint, keep: Retention, superseded: Callable[[], None]) -> None:
    """Delete the checkpoints that need not stay, now that there is this one."""
    scores = checkpoint_scores(store, committed.stage) if keep.best else None
    there = Inventory(store, committed.stage, committed.by, scores)
    for one in there.found:
        if one.by <= committed.by and not (one.readable or one.foreign):
            log.error("CHECKPOINT DAMAGED, it counts for none of those that are kept: %s", one.wrong)
    excess = there.excess(committed.by, keep, f"checkpoints/{committed.stage}/{committed.file}")
    superseded()
    delete_objects(store, excess)
