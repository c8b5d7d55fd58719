"""Checkpoints: what is kept, what is deleted, and what a writer does that finds itself superseded."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.runs import checkpoint, checkpoint_writer
from cluster.runs.checkpoint import DamagedCheckpoint, OtherVersion
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.inventory import delete_objects, remove_orphans
from cluster.runs.lineage import open_attempt
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, Superseded, assert_newest_life, open_life
from cluster.storage import StorageError, Store
from cluster.telemetry.metrics_log import MetricsLog, read_rows
from cluster.training.engine import Fragment


def test_an_unreadable_manifest_does_not_stop_the_next_checkpoint(store: Store) -> None:
    store.put("checkpoints/autoencoder/000000000000005-000001.json", b"{half")
    writer = CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(2), superseded=lambda: None)
    facts = {"stage": "autoencoder", "progress": 9, "steps": 3, "life": 1, "dataset": "", "config": {}}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.ones(2)})], {}, **facts)
    writer.commit()
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert newest.progress == 9
    assert checkpoint.assemble(store, newest, "master")["w"].tolist() == [1, 1]


def writer_of(store: Store, keep: int = 3, superseded: Callable[[], None] = lambda: None) -> CheckpointWriter:
    return CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(keep), superseded=superseded)


def commit(writer: CheckpointWriter, progress: int, life: int = 1, attempt: int = 0, weight: float | None = None) -> None:
    facts = {"stage": "autoencoder", "progress": progress, "steps": progress, "dataset": "", "config": {}}
    weights = torch.full((2,), float(progress) if weight is None else weight)
    writer.begin([Fragment("w", (2,), 0, {"master": weights})], {}, **facts, life=life, attempt=attempt)
    writer.commit()
    writer._cleaning.result()  # old ones are deleted behind training


def progresses(store: Store) -> list[int]:
    return [checkpoint.read_manifest(store, key).progress for key in checkpoint.list_checkpoints(store, "autoencoder")]


def parts(store: Store) -> set[str]:
    return {entry.key for entry in store.list("checkpoints/autoencoder/parts/")}


def test_each_byte_of_a_checkpoint_is_uploaded_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, list[int]] = {}
    for name in ("put", "create", "put_file"):
        upload = getattr(store, name)

        def counted(key: str, data: Any, upload: Any = upload) -> Any:
            sent.setdefault(key, []).append(data.stat().st_size if isinstance(data, Path) else len(data))
            return upload(key, data)

        monkeypatch.setattr(store, name, counted)
    writer, weights = writer_of(store), {name: torch.rand(100_000) for name in ("master", "exp_avg", "exp_avg_sq", "ema")}
    facts = {"stage": "autoencoder", "progress": 6, "steps": 1, "dataset": "", "config": {}, "life": 1, "attempt": 0}
    writer.begin([Fragment("w", (100_000,), 0, weights)], {}, **facts)
    writer.commit()
    writer._cleaning.result()
    written = {key: sizes for key, sizes in sent.items() if "/parts/" in key}
    assert all(len(sizes) == 1 for sizes in sent.values()), sent
    assert 4 * 400_000 <= sum(size for (size,) in written.values()) < 4 * 400_000 + 4096, "weights, moments and average, and little else"


def test_a_part_of_the_next_checkpoint_that_another_rank_has_uploaded_already_outlives_the_commit_of_this_one(store: Store) -> None:
    writer, early = (
        CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(1), superseded=lambda: None),
        "checkpoints/autoencoder/parts/next.safetensors",
    )
    commit(writer, 1)
    first = parts(store)
    store.put(early, b"of rank 1")
    commit(writer, 2)
    assert early in parts(store) and not first & parts(store), "the old checkpoint is gone, the coming one is not"


def test_what_a_life_that_died_left_behind_goes_when_the_next_begins(store: Store) -> None:
    writer, orphan = (
        CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(2), superseded=lambda: None),
        "checkpoints/autoencoder/parts/orphan.safetensors",
    )
    for progress in (1, 2):
        commit(writer, progress)
    named = parts(store)
    store.put(orphan, b"of a rank that was killed")
    remove_orphans(store, "autoencoder", Attempt(2, 0))
    assert parts(store) == named and len(named) == 2


def test_a_checkpoint_that_goes_between_listing_and_reading_is_no_checkpoint(store: Store) -> None:
    commit(CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(2), superseded=lambda: None), 1)
    (listed,) = checkpoint.list_checkpoints(store, "autoencoder")
    store.delete(listed)
    with pytest.raises(DamagedCheckpoint, match=f"{store.url}/{listed} is gone"):
        checkpoint.read_manifest(store, listed)


def test_nothing_is_swept_while_a_manifest_cannot_be_read(store: Store) -> None:
    writer = CheckpointWriter(store, lambda value: [value], rank=0, keep=Retention(2), superseded=lambda: None)
    commit(writer, 1)
    store.put("checkpoints/autoencoder/000000000000009-000001.json", b'{"version": 99}')
    store.put("checkpoints/autoencoder/parts/of-a-later-version.safetensors", b"whose manifest this program cannot read")
    before = parts(store)
    remove_orphans(store, "autoencoder", Attempt(2, 0))
    assert parts(store) == before


class Supersedes:
    """A newer attempt that begins before or after an old one creates a manifest."""

    def __init__(self, store: Store, look: int):
        self._store, self._look, self._looks = store, look, 0

    def __call__(self) -> None:
        self._looks += 1
        if self._looks == self._look:
            open_attempt(self._store, 1)
        assert_newest_life(self._store, 1, 0)


def test_a_writer_that_is_superseded_before_the_create_writes_nothing(store: Store) -> None:
    assert open_attempt(store, open_life(store, {})) == 0
    commit(writer_of(store), 1)
    before = {entry.key for entry in store.list("checkpoints/") if "/parts/" not in entry.key}
    with pytest.raises(Superseded):
        commit(writer_of(store, 1, Supersedes(store, 1)), 2)
    assert progresses(store) == [1] and before == {entry.key for entry in store.list("checkpoints/") if "/parts/" not in entry.key}


def test_what_a_newer_attempt_has_found_and_goes_on_from_is_not_taken_from_it(store: Store) -> None:
    assert open_attempt(store, open_life(store, {})) == 0
    commit(writer_of(store), 1)
    with pytest.raises(Superseded):
        commit(writer_of(store, 1, Supersedes(store, 2)), 2)
    assert progresses(store) == [2, 1], "it began when that one was there, and nothing of before was deleted either"


def test_what_was_created_after_a_newer_attempt_had_looked_counts_for_nobody_and_goes_with_the_next_one(store: Store) -> None:
    assert open_attempt(store, open_life(store, {})) == 0
    commit(writer_of(store), 1)
    assert open_attempt(store, 1) == 1
    late = writer_of(store)  # of an attempt that is over, and does not know it
    commit(late, 2)
    assert progresses(store) == [1]
    remove_orphans(store, "autoencoder", Attempt(1, 1))
    assert len([entry for entry in store.list("checkpoints/") if "/parts/" not in entry.key]) == 1


def test_a_commit_of_what_is_committed_already_is_done_and_one_of_other_parts_is_an_error(store: Store) -> None:
    commit(writer_of(store), 6)
    commit(writer_of(store), 6)  # the answer to the first one was lost, or its group started again with the same numbers
    assert progresses(store) == [6]
    with pytest.raises(StorageError, match="was created with other parts by another group with the same numbers"):
        commit(writer_of(store), 6, weight=0.5)
    assert progresses(store) == [6]


def test_attempts_that_come_to_the_same_progress_have_manifests_and_parts_of_their_own(store: Store) -> None:
    commit(writer_of(store), 6)
    commit(writer_of(store), 6, attempt=1)
    keys = checkpoint.list_checkpoints(store, "autoencoder")
    assert [key.rpartition("-")[2] for key in keys] == ["000001.1.json", "000001.0.json"]
    assert [checkpoint.read_manifest(store, key).by for key in keys] == [Attempt(1, 1), Attempt(1, 0)]
    assert len(parts(store)) == 2


def lose_part(store: Store, progress: int) -> None:
    """Take away what a checkpoint is made of."""
    found = next(one for one in map(lambda key: checkpoint.read_manifest(store, key), keys(store)) if one.progress == progress)
    store.delete(f"checkpoints/autoencoder/{found.parts[0].file}")


def keys(store: Store) -> list[str]:
    return checkpoint.list_checkpoints(store, "autoencoder")


def test_only_whole_checkpoints_count_for_what_is_kept(store: Store) -> None:
    for progress in (1, 2, 3):
        commit(writer_of(store), progress)
    lose_part(store, 2)
    commit(writer_of(store), 4)
    assert progresses(store) == [4, 3, 2, 1], "2 is damaged, so that three are left"
    commit(writer_of(store), 5)
    assert progresses(store) == [5, 4, 3], "and it is not kept for ever"


def test_after_falling_back_below_damaged_checkpoints_the_new_ones_are_kept(store: Store) -> None:
    for progress in (4, 5, 6):
        commit(writer_of(store, keep=9), progress)
    for entry in list(store.list("checkpoints/autoencoder/parts/")):  # of the same size, as bytes that rot are
        store.put(entry.key, bytes(entry.size))
    for progress in (2, 3, 4):
        commit(writer_of(store), progress, life=2)
        assert progresses(store)[-1] == 2
    assert progresses(store) == [4, 3, 2] and len(parts(store)) == 3


def test_a_manifest_that_cannot_be_read_goes_when_enough_newer_ones_are_whole(store: Store) -> None:
    store.put("checkpoints/autoencoder/000000000000005-000001.json", b"{half")
    commit(writer_of(store, keep=2), 6)
    assert progresses_or_damage(store) == [6, "damaged"]
    commit(writer_of(store, keep=2), 7)
    assert progresses_or_damage(store) == [7, 6]


def progresses_or_damage(store: Store) -> list[int | str]:
    found: list[int | str] = []
    for key in keys(store):
        try:
            found.append(checkpoint.read_manifest(store, key).progress)
        except DamagedCheckpoint:
            found.append("damaged")
    return found


def test_what_does_not_count_is_deleted_and_a_newer_attempt_s_is_left_alone(store: Store) -> None:
    life = open_life(store, {})
    open_attempt(store, life)
    commit(writer_of(store), 6)
    assert open_attempt(store, life) == 1
    commit(writer_of(store, keep=9), 12)  # by the first attempt, which woke and found itself superseded by nobody
    commit(writer_of(store, keep=9), 9, attempt=1)
    assert progresses(store) == [9, 6]
    assert [entry.key for entry in store.list("checkpoints/autoencoder/0") if "012-" in entry.key] == []
    store.put("checkpoints/autoencoder/parts/000001.1-coming.safetensors", b"of the newer attempt's next checkpoint")
    before = parts(store)
    remove_orphans(store, "autoencoder", Attempt(1, 0))
    assert parts(store) == before
    commit(writer_of(store, keep=1), 15)
    assert progresses(store)[0] == 9 and before - parts(store) == {key for key in before if "/000001.0-" in key}


def test_another_version_s_checkpoint_is_refused_by_name_and_outlives_every_commit(store: Store) -> None:
    key = "checkpoints/autoencoder/000000000000005-000001.0.json"
    store.put(key, b'{"version": 7}')
    for progress in (6, 7, 8):
        commit(writer_of(store, keep=1), progress)
    remove_orphans(store, "autoencoder", Attempt(9, 0))
    with pytest.raises(OtherVersion, match=rf"{store.url}/{key} has version 7, this program reads 1 and 2: go on with the newer program"):
        checkpoint.read_manifest(store, key)


def test_a_checkpoint_of_the_version_before_is_read_gone_on_from_and_deleted_in_its_turn(store: Store) -> None:
    commit(writer_of(store), 6)
    (key,) = keys(store)
    values = json.loads(store.read(key))
    (part,) = values["parts"]
    store.put(
        f"checkpoints/autoencoder/parts/{part['hash']}.safetensors",
        store.read(f"checkpoints/autoencoder/parts/000001.0-{part['hash']}.safetensors"),
    )
    for entry in list(store.list()):
        if "000001.0" in entry.key:
            store.delete(entry.key)
    del values["attempt"], part["attempt"]
    store.put("checkpoints/autoencoder/000000000000006-000001.json", json.dumps(values | {"version": 1}).encode())
    (old,) = keys(store)
    found = checkpoint.read_manifest(store, old)
    assert old.endswith(found.file) and checkpoint.assemble(store, found, "master")["w"].tolist() == [6, 6]
    commit(writer_of(store, keep=1), 12, life=2)
    assert progresses(store) == [12] and len(parts(store)) == 1


def test_neither_deleting_nor_listing_nor_rows_nor_the_manifest_is_waited_for_by_a_step(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer until the test lets it: begin and publish return all the same."""
    answers, asked = threading.Event(), []
    for name in ("put", "create", "list", "delete"):
        original = getattr(type(store), name)

        def slow(self, *given, original=original, name=name):
            if threading.current_thread() is not threading.main_thread():
                asked.append(name)
                assert answers.wait(60)
            return original(self, *given)

        monkeypatch.setattr(type(store), name, slow)
    one = writer_of(store)
    facts = {"stage": "autoencoder", "progress": 1, "steps": 1, "dataset": "", "config": {}, "life": 1, "attempt": 0}
    log = MetricsLog(store, 1, 0, "autoencoder")
    log.add(progress=1, loss=0.5)
    one.begin([Fragment("w", (2,), 0, {"master": torch.ones(2)})], {}, log.take(), **facts)
    assert one.busy and not one.uploaded
    answers.set()
    while not one.uploaded:
        time.sleep(0.01)
    answers.clear()
    one.publish()
    assert one.busy and not one.written
    answers.set()
    while not one.written:
        time.sleep(0.01)
    answers.clear()
    assert one.finish().progress == 1 and not one.busy
    answers.set()
    one.close()
    assert {"put", "list"} <= set(asked) and asked.count("create") == 2 and progresses(store) == [1]
    assert [row["loss"] for row in read_rows(store, "autoencoder")] == [0.5]


def test_what_the_last_checkpoints_replaced_is_deleted_also_if_deleting_was_slower_than_they_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, prune = threading.Event(), threading.Event(), checkpoint_writer.prune

    def slow(*given) -> None:
        begun.set()
        assert go.wait(60)
        prune(*given)

    monkeypatch.setattr(checkpoint_writer, "prune", slow)
    writer = writer_of(store, keep=1)
    for progress in (1, 2, 3, 4):
        facts = {"stage": "autoencoder", "progress": progress, "steps": progress, "dataset": "", "config": {}, "life": 1, "attempt": 0}
        writer.begin([Fragment("w", (2,), 0, {"master": torch.full((2,), float(progress))})], {}, **facts)
        writer.commit()
        assert begun.wait(60)
    assert progresses(store) == [4, 3, 2, 1], "the first deletion has not begun"
    go.set()
    writer.close()
    assert progresses(store) == [4] and len(parts(store)) == 1


def test_deleting_makes_its_requests_in_parallel_manifests_before_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 parts one by one, at 30 ms each, would take 15 s."""
    for progress in (1, 2, 3):
        commit(writer_of(store, keep=9), progress)
    delete, together, order = type(store).delete, threading.Barrier(2), []

    def meet(self: Store, key: str) -> None:
        together.wait(60)  # one by one, nobody would come
        order.append("/parts/" in key)
        delete(self, key)

    monkeypatch.setattr(type(store), "delete", meet)
    delete_objects(store, [*parts(store), *keys(store)][:2] + keys(store)[:2])
    assert order == [False, False, True, True] and progresses(store) == [1]


def test_memory_for_the_copies_is_there_before_the_first_checkpoint(store: Store) -> None:
    writer = writer_of(store)
    fragments = [Fragment("w", (2,), 0, {"master": torch.ones(2)})]
    writer.prepare(fragments, {"low": torch.zeros(3)}).result()
    memory = writer._snapshot._memory
    facts = {"stage": "autoencoder", "progress": 1, "steps": 1, "dataset": "", "config": {}, "life": 1, "attempt": 0}
    writer.begin(fragments, {"low": torch.zeros(3)}, **facts)
    writer.commit()
    assert writer._snapshot._memory is memory and progresses(store) == [1]
