"""From a tree of clips to a dataset: shards as Ray tasks, the manifest last. The same command again resumes, or adds new clips.

Published shards are never rewritten. A clip that is in the dataset already is not read again, but for the first one of each
shard, which must still be the same; clips that are new in the tree, or were refused before, become new shards behind the old.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.config.schema import Workers
from cluster.data.build_shard import BuiltShard, Pair, ShardSource, Tree, assert_unchanged, build_shard
from cluster.data.manifest import CURRENT, File, Manifest, Split, StreamEntry, current_manifest, publish_successor, read_file
from cluster.data.reader import Reader
from cluster.data.shards import encode_npy, index_dtype, members, shard_name
from cluster.runtime.tasks import map_tasks
from cluster.storage import AlreadyExists, Store, content_hash
from cluster.storage.parallel import parallel_map
from reactdiff.clip import PERSONS, TARGETS

TRAIN = "train"
"""The one split that is not for evaluation and needs no appropriateness matrix."""

Progress = Callable[[int, int], None]
Keys = dict[str, np.ndarray]
"""split -> the keys of its clips in their order, (clips,) bytes."""

NONE = np.array([], dtype=index_dtype(0)["key"])
"""No keys."""


class RefusedClips(ValueError):
    """Clips that cannot be used, where every clip should be.

    Attributes:
        clips: split, key and reason of each.
    """

    def __init__(self, clips: list[tuple[str, str, str]]):
        super().__init__(clips)
        self.clips = clips

    def __str__(self) -> str:
        split, _, reason = self.clips[0]
        return (
            f"{len(self.clips)} clips cannot be used, the first in split {split}: {reason}; repair them, or leave them out without --strict"
        )


@dataclass(frozen=True)
class PrepareResult:
    """What preparing a dataset came to.

    Attributes:
        manifest: the dataset's state.
        added: split -> clips that were added.
        refused: (split, key, reason) of each clip that was left out.
    """

    manifest: Manifest
    added: dict[str, int]
    refused: list[tuple[str, str, str]]


def prepare(
    tree: Tree, store: Store, *, clips_per_shard: int, strict: bool, progress: Progress, one_to_many: bool = False
) -> PrepareResult:
    """Make or grow the dataset in `store` so that it holds every usable clip of the tree.

    Args:
        tree: where clips come from.
        store: where the dataset is, or will be.
        clips_per_shard: of new shards; the last of a split is shorter.
        strict: refuse everything if any clip is refused.
        progress: called with (clips done, clips to do).
        one_to_many: keep the appropriateness matrix of `train`, too, as a dataset that has it does in any case.

    Raises:
        RefusedClips: if a clip is, and `strict`; nothing is published then.
        ValueError: if the dataset there is of another shape or of other clips, if no clip can be used, if leaving clips
            out leaves a row of an appropriateness matrix without a 1, or if the tree has none that is asked for.
        StorageError: if the store fails.
    """
    store.assert_conditional_writes()
    work = _Preparation(ShardSource(tree, store, strict), *_current_state(store))
    work.assert_grows()
    one_to_many |= work.old_split(TRAIN).appropriateness is not None
    matrices = {split: tree.appropriateness(split) for split in tree.splits if split != TRAIN or one_to_many}
    if one_to_many and matrices.get(TRAIN) is None:
        raise ValueError(
            f"the tree does not say which reactions are appropriate in split {TRAIN}: put the official appropriateness matrix there "
            "(docs/data.md has the names), or prepare a new dataset without --one-to-many"
        )
    work.compare()
    plans = work.plan(clips_per_shard)
    results = work.build(plans, progress)
    refused = [(plan.split, *entry) for plan, result in results for entry in result.refused]
    if refused and strict:
        raise RefusedClips(refused)
    splits = {split: work.split(split, results, matrices.get(split)) for split in tree.splits}
    if not any(len(split.shards) for split in splits.values()):
        raise ValueError(f"no clip of the tree can be used; {refused[0][2] if refused else 'it has none'}")
    added = {split: sum(part.shards.clips) - len(work.old_keys(split)) for split, part in splits.items()}
    return PrepareResult(work.publish(splits), added, refused)


def _current_state(store: Store) -> tuple[Manifest | None, str, Keys]:
    """The dataset as it is: its manifest, the etag by which that is replaced, and the keys of its clips."""
    if not store.exists(CURRENT):
        return None, "", {}
    manifest, etag = current_manifest(store)
    keys = {split: np.concatenate([NONE, *Reader(store, manifest, split).keys()]) for split in manifest.splits}
    return manifest, etag, keys


@dataclass(frozen=True)
class _NewShard:
    """A shard to be built."""

    split: str
    number: int
    pairs: list[Pair]


Results = list[tuple[_NewShard, BuiltShard]]


@dataclass(frozen=True)
class _Preparation:
    """One preparation.

    Attributes:
        source: the tree and the store.
        old: the dataset's manifest before, None if there was no dataset.
        etag: by which that is replaced.
        keys: of the clips before.
    """

    source: ShardSource
    old: Manifest | None
    etag: str
    keys: Keys

    @property
    def tree(self) -> Tree:
        return self.source.tree

    @property
    def store(self) -> Store:
        return self.source.store

    def old_keys(self, split: str) -> np.ndarray:
        """The keys of a split's clips before, in their order."""
        return self.keys.get(split, NONE)

    def old_split(self, split: str) -> Split:
        """A split's state before."""
        return self.old.splits.get(split, Split()) if self.old else Split()

    def assert_grows(self) -> None:
        """A dataset only grows: same shape, and no clip missing."""
        if self.old is None:
            return
        shape = (
            ("frames", self.old.frames, self.tree.frames),
            ("streams", self.old.stream_specs, tuple(self.tree.streams)),
            ("members", tuple(self.old.members), members(self.source.arrays)),  # other programs' tars need not have the JSON
        )
        for what, old, new in shape:
            if old != new:
                raise ValueError(f"the dataset at {self.store.url} has {what} {old}, but the tree has {new}: prepare it to another URL")
        for split in self.old.splits:
            old_keys, names = self.old_keys(split), _keys(self.tree.pairs(split)) if split in self.tree.splits else NONE
            if (missing := old_keys[~np.isin(old_keys, names)]).size:
                raise ValueError(
                    f"split {split} of the dataset at {self.store.url} has {len(missing)} clips that the tree lacks, "
                    f"for example {missing[0].decode()}: a dataset only grows; prepare this tree to another URL"
                )

    def compare(self) -> None:
        """The first clip of every shard must still be what the tree has."""
        calls = []
        for split, keys in self.keys.items():
            assert self.old is not None, "it has shards"
            pairs, part, clip = {pair.key: pair for pair in self.tree.pairs(split)}, self.old_split(split).shards, 0
            for position in range(len(part)):
                calls.append((self.old.shard(split, position), part.info(position), [pairs[keys[clip].decode()]]))
                clip += part.clips[position]
        _run(assert_unchanged, calls, self.source, lambda number: None)

    def plan(self, clips_per_shard: int) -> list[_NewShard]:
        """New clips cut into shards, each with a number that its content has claimed: no two preparations write to one shard."""
        plans = []
        for split in self.tree.splits:
            number = max(map(int, self.old_split(split).shards.number), default=-1) + 1
            pairs = self.tree.pairs(split)
            new = list(itertools.compress(pairs, ~np.isin(_keys(pairs), self.old_keys(split))))
            parts = [new[start : start + clips_per_shard] for start in range(0, len(new), clips_per_shard)]
            numbers = self._claim_numbers(split, number, parts)
            plans += [_NewShard(split, number, pairs) for number, pairs in zip(numbers, parts, strict=True)]
        return plans

    def _claim_numbers(self, split: str, number: int, parts: list[list[Pair]]) -> list[int]:
        """A number for each part, from this one on; those that others have claimed are passed over."""
        numbers, waiting = [-1] * len(parts), list(range(len(parts)))
        while waiting:
            tries = list(zip(waiting, itertools.count(number), strict=False))
            wins = parallel_map(lambda one: _claim(self.store, shard_name(split, one[1]), self.source.content(parts[one[0]])), tries)
            waiting = []
            for (part, candidate), won in zip(tries, wins, strict=True):
                if won:
                    numbers[part] = candidate
                else:
                    waiting.append(part)
            number += len(tries)
        return numbers

    def build(self, plans: list[_NewShard], progress: Progress) -> Results:
        """Build every planned shard."""
        total, done = sum(len(plan.pairs) for plan in plans), 0

        def count(number: int) -> None:
            nonlocal done
            done += len(plans[number].pairs)
            progress(done, total)

        calls = [(shard_name(plan.split, plan.number), plan.pairs) for plan in plans]
        return list(zip(plans, _run(build_shard, calls, self.source, count), strict=True))

    def split(self, split: str, results: Results, matrix: np.ndarray | None) -> Split:
        """A split's new state: the old clips in their order, then the new ones."""
        old, new = self.old_split(split), [(plan, result) for plan, result in results if plan.split == split]
        order = [key.decode() for key in self.old_keys(split).tolist()]
        for plan, result in new:
            left_out = {key for key, _ in result.refused}
            order += [pair.key for pair in plan.pairs if pair.key not in left_out]
        return Split(
            shards=old.shards.plus({plan.number: result.info for plan, result in new if result.info.clips}),
            appropriateness=None if matrix is None else self._put(split, "appropriateness", encode_npy(self._select(split, matrix, order))),
            subjects=self._subjects(split, [result for _, result in new]),
        )

    def publish(self, splits: dict[str, Split]) -> Manifest:
        """The state that is current in the end: the old one, if nothing but its origin would change."""
        streams, old = self.tree.streams, self.old
        manifest = Manifest(
            origin=old.identity if old else "",
            kind="clips",
            frames=self.tree.frames,
            streams=[StreamEntry(name=stream.name, kind=stream.kind, width=stream.width) for stream in streams],
            targets=TARGETS,
            members=list(members(self.source.arrays)),
            splits=splits,
            provenance=self.tree.provenance(),
        )
        return publish_successor(self.store, manifest, old, self.etag)

    def _select(self, split: str, matrix: np.ndarray, order: list[str]) -> np.ndarray:
        """The rows and columns of the matrix that are of these clips, plain then mirrored."""
        place = {pair.key: row for row, pair in enumerate(self.tree.pairs(split))}
        plain = np.array([place[key] for key in order], dtype=np.int64)
        rows_of_clips = np.concatenate([plain, plain + len(place)])
        submatrix = matrix[np.ix_(rows_of_clips, rows_of_clips)]
        if (empty := np.flatnonzero(~submatrix.any(axis=1))).size:
            rows = ", ".join(f"{order[row % len(order)]} ({'plain' if row < len(order) else 'mirrored'})" for row in empty[:10])
            raise ValueError(
                f"split {split}: without the refused clips {empty.size} rows of its appropriateness matrix have no 1 left: {rows}. "
                f"Repair the refused clips, or remove these from {split}.csv, too"
            )
        return submatrix

    def _subjects(self, split: str, new: list[BuiltShard]) -> File | None:
        """Who is seen in each clip; None where the tree does not tell for all."""
        file = self.old_split(split).subjects
        if len(self.old_keys(split)) and file is None:
            return None
        names = json.loads(read_file(self.store, file)) if file else {person: [] for person in PERSONS}
        for result in new:
            for person in PERSONS:
                names[person] += result.subjects[person]
        if any(name is None for person in PERSONS for name in names[person]):
            return None
        return self._put(split, "subjects", json.dumps(names, sort_keys=True).encode())

    def _put(self, split: str, name: str, data: bytes) -> File:
        digest = content_hash(data)
        part = File(file=f"{split}/{name}-{digest}.{'json' if name == 'subjects' else 'npy'}", hash=digest)
        self.store.put(part.file, data)
        return part


def _keys(pairs: Sequence[Pair]) -> np.ndarray:
    """The keys of clips, (clips,) bytes."""
    return np.array([pair.key.encode() for pair in pairs], dtype=NONE.dtype)


def _claim(store: Store, name: str, content: str) -> bool:
    """Whether this shard is for this content, from now on or since an earlier attempt."""
    key, claim = f"{name}.plan.json", json.dumps({"content": content}).encode()
    try:
        store.create(key, claim)
    except AlreadyExists:
        return store.read(key) == claim
    return True


def _run(function: Callable[..., Any], calls: list[tuple[Any, ...]], source: ShardSource, done: Callable[[int], None]) -> list[Any]:
    """The results of all calls, in order; the error of a task as the task raised it."""
    results: list[Any] = [None] * len(calls)
    if calls:
        for number, result in map_tasks(function, calls, Workers(), shared=source):
            results[number] = result
            done(number)
    return results
