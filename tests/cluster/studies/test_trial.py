"""How a trial ends: what its run raises, and what the ledger says then."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import ConfigError
from cluster.evaluation.rung import write_rung
from cluster.runtime.failures import PERSON, TABLE, StageFailed, exit_code
from cluster.studies import trial as module
from cluster.studies.halving import Choice
from cluster.studies.search import Search
from cluster.studies.trial import run_trial
from cluster.training.gradient import NonFinite
from tests.cluster.support.sweeps import rung, search_in


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """Of trials whose autoencoder is there."""
    monkeypatch.setattr(module, "train_first_stage", lambda *_: None)
    return search_in(tmp_path)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> StageFailed:
    """What every run ends with from here on, as it comes from a rank."""
    non_finite = next(failure for failure in TABLE if failure.name == "non_finite")
    failed = StageFailed("diffusion", non_finite, pickle.loads(pickle.dumps(error)))

    def execute(*_: Any, **__: Any) -> None:
        raise failed

    monkeypatch.setattr(module, "execute", execute)
    return failed


def test_weights_that_are_not_finite_are_a_trial_s_end(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, NonFinite("step 3 was not applied"))
    run_trial(search.opened, 0, lambda _: None)
    search.refresh()
    assert search.ledger.trials[0].end == "FAILED" and "step 3 was not applied" in search.ledger.trials[0].why


def test_an_item_that_is_not_finite_ends_no_trial_for_the_data_can_be_mended(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = failing(monkeypatch, NonFinite("step 3 was not applied", [7]))
    with pytest.raises(StageFailed, match="step 3 was not applied"):
        run_trial(search.opened, 0, lambda _: None)
    search.refresh()
    assert search.unfinished()[0] == 0 and exit_code(failed) == PERSON


def test_a_number_under_which_the_ledger_has_another_run_is_refused(search: Search) -> None:
    search.ledger.enter_trial(9, search.ledger.trials[0].point, "shown-00000000", "0")
    with pytest.raises(ConfigError, match=r"trial 9 of sweep shown is run shown-00000000 in .*, but here it would be shown-"):
        run_trial(search.opened, 9, lambda _: None)


def test_a_look_asks_for_one_rung_and_for_no_decision_but_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = search_in(tmp_path, halving={"rungs": [10, 20, 30], "clips": 8}).opened
    steering = module._Steering(opened, 0, "one", lambda _: None, lambda: False)
    run, asked = opened.home.at("runs/one"), list[str]()
    for name in ("get", "exists", "size", "list"):
        plain = getattr(type(run), name)
        monkeypatch.setattr(type(run), name, lambda self, key="", plain=plain: asked.append(key) or plain(self, key))

    def ten_looks() -> list[str]:
        asked.clear()
        assert {steering._ask() for _ in range(10)} == {""}
        return asked

    assert steering.look() == "" and len(asked) == 6, "each rung, and what an earlier release called it"
    assert len(ten_looks()) == 10 and len(set(asked)) == 3
    write_rung(run, 20, 8, 21, rung(21, 0.0))  # the first one was passed before it was asked for
    ten_looks()
    assert steering._entered == {1}
    opened.ledger.enter_choice(Choice(0, 1, True))
    ten_looks()
    assert len(ten_looks()) == 10 and not any("choice" in key for key in asked), "what is decided is decided"
    write_rung(run, 10, 8, 11, rung(11, 0.0))
    write_rung(run, 30, 8, 31, rung(31, 0.0))
    ten_looks()
    opened.ledger.enter_choice(Choice(0, 0, True))
    assert len(set(ten_looks())) == 2, "the next decision is asked for when the one before it is known"
    opened.ledger.enter_choice(Choice(0, 2, False, 1, 0.001, 0.01))
    assert steering._ask() == steering.look() == "stopped at rung 3: trial 1 is better, p = 0.001 (at most 0.01)"
