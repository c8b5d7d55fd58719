"""The ledger keeps facts in the store, and whoever reads it finds the same."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Permanent, Store, open_store
from cluster.studies.halving import WORST, Choice
from cluster.studies.ledger import Ledger, TrialRecord

MEASURED = {"progress": 96, "levels": [[0.0, 0.1], [2.0, 1.9]], "errors": [[1.0, 0.5], [3.0, 0.5]]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "ledger"))


def read(store: Store) -> Ledger:
    ledger = Ledger(store)
    ledger.refresh()
    return ledger


def test_what_is_entered_is_read_by_another_process(store: Store) -> None:
    ledger = Ledger(store)
    ledger.enter_trial(0, {"model.layers": 4}, "sweep-abc", "0")
    ledger.enter_rung(0, 0, MEASURED)
    ledger.enter_choice(Choice(0, 0, False, 2, 0.001, 0.01, 31.5))
    ledger.enter_end(0, "DONE", scores={"FRCorr": 0.25, "FRDist": None})
    (record,) = read(store).trials.values()
    assert (record.number, record.point, record.run, record.end) == (0, {"model.layers": 4}, "sweep-abc", "DONE")
    assert record.choices == {0: Choice(0, 0, False, 2, 0.001, 0.01, 31.5)}
    assert record.scores == {"FRCorr": 0.25, "FRDist": None}
    assert record.error(0) == 1.25 and np.array_equal(record.standing.errors[0], [1.25])
    assert record.standing.stopped_at == 0


def test_an_error_that_is_not_finite_is_the_worst_of_its_clip_and_leaves_a_mean(store: Store) -> None:
    ledger, errors = Ledger(store), [[1.0, 1.0], [1.0, math.nan], [2.0, math.inf], [1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]
    ledger.enter_trial(0, {}, "run", "0")
    ledger.enter_rung(0, 0, {**MEASURED, "errors": errors})
    (record,) = read(store).trials.values()
    assert record.standing.errors[0].tolist() == [1.0, WORST, WORST] and record.error(0) == pytest.approx(2 * WORST / 3)


def test_a_reader_takes_what_came_since_and_asks_for_nothing_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = Ledger(store), Ledger(store)
    writer.enter_trial(1, {}, "run", "0")
    reader.refresh()
    asked: list[str] = []
    plain = type(store).get
    monkeypatch.setattr(type(store), "get", lambda self, key: asked.append(key) or plain(self, key))
    writer.enter_rung(1, 0, MEASURED)
    reader.refresh()
    reader.refresh()
    assert asked == ["000001/rung-0.json"] and reader.trials[1].rungs == {0: MEASURED}


def test_a_trial_is_read_as_it_was_suggested_without_anything_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(store).enter_trial(3, {"a": 1}, "run", "0")
    Ledger(store).enter_rung(3, 0, MEASURED)
    monkeypatch.setattr(type(store), "list", None)
    assert Ledger(store).suggested(3) == TrialRecord(3, {"a": 1}, "run", "0")


def test_the_same_again_changes_nothing_and_of_two_measurements_the_first_stands(store: Store) -> None:
    for ledger in (Ledger(store), Ledger(store)):
        ledger.enter_trial(0, {"a": 1}, "run", "0")
        ledger.enter_choice(Choice(0, 0, True))
    ledger.enter_rung(0, 0, MEASURED)
    ledger.enter_rung(0, 0, {**MEASURED, "progress": 97})
    ledger.enter_end(0, "FAILED", "a loss that is not finite")
    ledger.enter_end(0, "DONE", scores={})
    record = read(store).trials[0]
    assert record.rungs[0]["progress"] == 96 and (record.end, record.why) == ("FAILED", "a loss that is not finite")


def test_another_trial_of_the_same_number_or_another_decision_is_an_error_that_shows_both(store: Store) -> None:
    ledger = Ledger(store)
    ledger.enter_trial(0, {"a": 1}, "run", "0")
    with pytest.raises(Permanent, match=r'000000/trial.json says(.|\n)*"a": 1(.|\n)*but now it would say(.|\n)*"a": 2'):
        ledger.enter_trial(0, {"a": 2}, "run", "0")
    ledger.enter_choice(Choice(0, 1, True))
    with pytest.raises(Permanent, match=r"choice-1.json"):
        ledger.enter_choice(Choice(0, 1, False))


def test_what_was_decided_about_a_trial_is_looked_for_in_the_store(store: Store) -> None:
    ledger, other = Ledger(store), Ledger(store)
    other.enter_choice(Choice(3, 0, True))
    assert ledger.decided(3, 0) == Choice(3, 0, True) and ledger.decided(3, 1) is None
    other.enter_choice(Choice(3, 1, False, 0, 0.001, 0.01))
    assert ledger.decided(3, 1) == Choice(3, 1, False, 0, 0.001, 0.01)


def test_records_are_plain_json(store: Store) -> None:
    point = {"optim.lr": 1e-4, "model.facial": ["au"]}
    Ledger(store).enter_trial(0, point, "run", "0")
    assert json.loads(store.read("000000/trial.json")) == {"point": point, "run": "run", "bracket": "0"}
