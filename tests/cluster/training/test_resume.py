"""Where a life goes on, and when it had better not."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cluster.config.identity import identity
from cluster.config.loading import load
from cluster.config.schema import Experiment
from cluster.data.stream import Share
from cluster.runs.checkpoint import OtherVersion
from cluster.runs.environment import ARITHMETIC
from cluster.runtime.failures import StageFailed, classify
from cluster.storage import Store, open_store
from cluster.training.engine import Fragment
from cluster.training.resume import Candidates, NoUsableCheckpoint, candidates, restore, tell_other_arithmetic

NOW = load(None)
SHARE = Share(6, 40, 1, 0)


def keep(store: Store, progress: int, **changes: Any) -> str:
    """A manifest, of one missing part."""
    part = {"hash": f"{progress:032x}", "bytes": 8, "extents": [["w", 0, 2]], "attempt": "000001.0"}
    values = {"stage": "autoencoder", "progress": progress, "steps": progress // 6, "life": 1, "dataset": "d", "config": identity(NOW)}
    key = f"checkpoints/autoencoder/{progress:015d}-000001.0.json"
    store.put(
        key, json.dumps(values | {"shapes": {"w": [2]}, "parts": [part], "quarantine": [], "attempt": 0, "version": 2} | changes).encode()
    )
    return key


@pytest.fixture
def run(tmp_path: Any) -> Store:
    return open_store(str(tmp_path))


def found(store: Store, experiment: Experiment = NOW) -> Candidates:
    return candidates(store, "autoencoder", SHARE, store, "d", experiment)


class Engine:
    """What is asked of an engine before anything is restored."""

    def held(self) -> list[Fragment]:
        return [Fragment("w", (2,), 0, {"master": torch.zeros(2)})]


def restored(store: Store, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> Any:
    engine: Any = Engine()
    return restore(engine, None, store, "autoencoder", found(store), gather)  # type: ignore[arg-type]


def test_a_stage_without_checkpoints_begins_at_the_beginning(run: Store) -> None:
    assert restored(run) is None


def test_a_stage_whose_checkpoints_are_all_unusable_stops_and_says_of_each_why(run: Store) -> None:
    missing, torn = keep(run, 12), keep(run, 6)
    run.put(torn, b"{half")
    short = keep(run, 22)  # the last one of a run of 22 items
    with pytest.raises(NoUsableCheckpoint) as error:
        restored(run)
    said = str(error.value)
    assert f"stage autoencoder of {run.url} has 3 checkpoints and none can be used" in said and "\n" not in said
    for key, why in (
        (missing, "is missing"),
        (torn, "is no checkpoint manifest"),
        (short, "less than 6 items, the last one of a shorter run"),
    ):
        assert (key in said or f"{12:032x}" in said) and why in said
    failure, cause = classify([pickle.loads(pickle.dumps(error.value))])  # as it comes from a rank
    advised = str(StageFailed("autoencoder", failure, cause))
    assert failure.name == "data" and "quarantine" not in advised and f"delete {run.url}/checkpoints/autoencoder before" in advised


def test_it_stops_on_every_rank_also_where_only_another_one_s_part_is_damaged(run: Store) -> None:
    keep(run, 12)
    with pytest.raises(NoUsableCheckpoint, match="the part of rank 7 is missing"):
        restored(run, lambda value: ["", "the part of rank 7 is missing"])


def test_one_that_was_taken_back_since_it_was_listed_is_none(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keep(run, 12)
    monkeypatch.setattr("cluster.runs.checkpoint.list_checkpoints", lambda store, stage: [key])
    run.delete(key)
    assert restored(run) is None


def test_a_checkpoint_of_another_identity_is_refused_with_the_fields_that_differ(run: Store) -> None:
    key = keep(run, 12)
    changed = load(None, ["model.hidden=64", "optim.lr.diffusion=1e-3", "workers.count=7", "optim.epochs=900"])
    assert len(found(run).usable) == 1
    with pytest.raises(
        ValueError, match=rf"{key} was trained with another identity; differing: model\.hidden \(was \d+, now 64\), optim\.lr \("
    ):
        found(run, changed)


def test_a_field_that_was_added_since_counts_only_where_it_is_not_its_default(run: Store) -> None:
    before = identity(NOW)
    del before["model.dropout"]
    keep(run, 12, config=before)
    assert len(found(run).usable) == 1
    with pytest.raises(ValueError, match=r"differing: model\.dropout \(was "):
        found(run, load(None, ["model.dropout=0.7"]))


def test_a_checkpoint_of_another_version_is_refused_and_nothing_older_is_gone_on_from(run: Store) -> None:
    keep(run, 6)
    keep(run, 12, version=7)
    with pytest.raises(OtherVersion, match="has version 7, this program reads 1 and 2"):
        found(run)


def test_a_release_that_rounds_otherwise_says_so(run: Store, caplog: pytest.LogCaptureFixture) -> None:
    keep(run, 12)
    (one,) = found(run).usable
    for facts, told in (({}, True), ({"arithmetic": ARITHMETIC}, False), ({"arithmetic": ARITHMETIC + 1}, True)):
        run.put("lives/000001.json", json.dumps(facts).encode())
        caplog.clear()
        tell_other_arithmetic(run, one)
        assert ("the checkpoint at 12 items is of a release that rounds otherwise" in caplog.text) == told
