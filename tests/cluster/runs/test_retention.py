"""Which checkpoints stay: a pure function of what there is and what is asked for, and what a writer makes of it."""

import random

import pytest
import torch

from cluster.config.loading import ConfigError, load
from cluster.runs.checkpoint import list_checkpoints, read_manifest
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention, StoredCheckpoint, checkpoint_scores
from cluster.runs.state import Attempt
from cluster.storage import Store
from cluster.telemetry.metrics_log import MetricsLog, validation_name
from cluster.training.engine import Fragment

STAGE = "autoencoder"


def stored(progress: int, attempt: int = 0, **more: object) -> StoredCheckpoint:
    by = Attempt(1, attempt)
    return StoredCheckpoint(f"checkpoints/{STAGE}/{progress:015d}-{by}.json", progress, by, **more)  # type: ignore[arg-type]


def kept(found: list[StoredCheckpoint], last: int, every: int = 0, best: int = 0, committed: str = "") -> dict[int, str]:
    why = Retention(last, every, best).kept(found, committed)
    return {one.progress: why[one.key] for one in found if one.key in why}


def test_the_last_ones_stay_and_the_first_at_or_after_each_multiple_and_the_best() -> None:
    found = [stored(progress, score=score) for progress, score in ((6, 0.9), (12, None), (18, 0.1), (24, 0.5), (30, 0.2), (36, 0.3))]
    assert kept(found, 2) == {30: "last", 36: "last"}
    assert kept(found, 1, 10) == {12: "every 10", 24: "every 10", 30: "every 10", 36: "last"}, "20 lies between 18 and 24; 0 is no multiple"
    assert kept(found, 1, 0, 2) == {6: "best", 24: "best", 36: "last"}
    assert kept(found, 1, 12, 1) == {6: "best", 12: "every 12", 24: "every 12", 36: "last, every 12"}
    assert kept(found, 1, 0, 9).keys() == {6, 18, 24, 30, 36}, "12 was never scored"


def test_what_a_longer_run_goes_on_from_stays_however_few_are_kept() -> None:
    there = [stored(progress) for progress in (6, 12, 15)]
    why = Retention(1, batch=6).kept(there)
    assert {one.progress: why[one.key] for one in there if one.key in why} == {12: "what a longer run goes on from", 15: "last"}
    assert len(Retention(1, batch=6).kept(there[:2])) == 1


def test_what_averages_need_stays_also_where_a_shorter_run_ended_just_before() -> None:
    there = [stored(progress) for progress in (96, 192, 768, 776, 784, 880, 976)]
    why = {one.progress: said for one in there if (said := Retention(1, averages=97, batch=16).kept(there).get(one.key))}
    assert why == {784: "for averages", 880: "for averages", 976: "last, for averages"}, "97 is reached at 112, 194 at 208, 776 at 784"


def test_what_stays_for_good_stays_however_many_come_after_it() -> None:
    """Deleting goes on with every checkpoint: what one round keeps the next one must keep too."""
    there: list[StoredCheckpoint] = []
    for progress in range(7, 700, 7):
        there.append(stored(progress))
        why = Retention(2, 100).kept(there)
        there = [one for one in there if one.key in why]
    assert [one.progress for one in there] == [105, 203, 301, 406, 504, 602, 686, 693]


def test_damaged_ones_and_those_that_do_not_count_are_neither_counted_nor_kept_for_good() -> None:
    found = [stored(10, wrong="a part is missing"), stored(12), stored(20, counts=False), stored(30, wrong="half a manifest"), stored(40)]
    assert kept(found, 1, 10) == {12: "every 10", 40: "last, every 10"}
    assert kept(found, 2) == {12: "last", 30: "damaged, newer than the last", 40: "last"}
    assert kept([stored(5, foreign=True, wrong="version 9", counts=False), stored(6), stored(7)], 1) == {5: "of another version", 7: "last"}


def test_the_later_one_of_two_at_the_same_progress_is_the_one_that_is_best() -> None:
    found = [stored(10, attempt=0, score=0.5), stored(10, attempt=1, score=0.5), stored(20, attempt=1), stored(30, attempt=1)]
    assert sorted(Retention(1, 10, 1).kept(found)) == [one.key for one in found[1:]]


@pytest.mark.parametrize("seed", range(50))
def test_the_committed_one_and_the_last_whole_ones_stay_whatever_there_is(seed: int) -> None:
    rng = random.Random(seed)
    numbers = sorted({(rng.randrange(3), rng.randrange(1, 60)) for _ in range(rng.randrange(1, 25))})
    found = [
        stored(progress, attempt, wrong=rng.choice(("", "", "torn")), counts=rng.random() < 0.8, score=rng.choice((None, rng.random())))
        for attempt, progress in numbers
    ]
    policy = Retention(rng.randrange(1, 4), rng.choice((0, 7)), rng.randrange(3), rng.choice((0, 5)))
    committed = StoredCheckpoint(f"checkpoints/{STAGE}/{99:015d}-000001.3.json", 99, Attempt(1, 3))
    why = policy.kept([*found, committed], committed.key)
    whole = [one.key for one in found if one.counts and not one.wrong]
    assert {committed.key, *whole[max(0, len(whole) - policy.last + 1) :]} <= why.keys()
    assert not why.keys() & {one.key for one in found if not one.counts}
    assert policy.kept([one for one in [*found, committed] if one.key in why], committed.key).keys() == why.keys(), "nothing more goes"


def commit(writer: CheckpointWriter, progress: int) -> None:
    facts = {"stage": STAGE, "progress": progress, "steps": progress, "dataset": "", "config": {}, "life": 1, "attempt": 0}
    writer.begin([Fragment("w", (2,), 0, {"master": torch.full((2,), float(progress))})], {}, **facts)
    writer.commit()
    writer._cleaning.result()


def test_a_writer_keeps_for_good_what_a_run_asks_for_and_deletes_the_parts_of_the_others(store: Store) -> None:
    writer = CheckpointWriter(store, lambda value: [value], 0, Retention(1, 20, 1), lambda: None)
    scores = MetricsLog(store, 1, 0, validation_name(STAGE))
    for progress in range(6, 66, 6):
        commit(writer, progress)
        scores.add(progress=progress, FRCorr={12: 0.8, 18: float("nan")}.get(progress, 0.1), FRDist=1.0)
        scores.flush()
    assert [read_manifest(store, key).progress for key in list_checkpoints(store, STAGE)] == [60, 42, 24, 12]
    assert len(list(store.list(f"checkpoints/{STAGE}/parts/"))) == 4
    assert checkpoint_scores(store, STAGE)[12] == 0.8 and 18 not in checkpoint_scores(store, STAGE), "a score that is no number is none"
    writer.close()


def test_best_ones_are_asked_for_only_where_checkpoints_are_scored() -> None:
    with pytest.raises(ConfigError, match=r"run.keep_best is 2, but no checkpoint is scored: set evaluation.watch"):
        load(None, ["run.keep_best=2", "evaluation.watch=0"])
    asked = load(None, ["run.keep=2", "run.keep_every.diffusion=50", "run.keep_best=1", "evaluation.watch=4", "diffusion.ema_every=30"])
    assert Retention.of(asked, "diffusion") == Retention(2, 50, 1, 30, 16) and Retention.of(asked, STAGE) == Retention(2, 0, 1, 0, 16)
