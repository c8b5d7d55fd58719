"""How a trial ends: what its run raises, and what the ledger says then."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import ConfigError
from cluster.runtime.failures import PERSON, TABLE, StageFailed, exit_code
from cluster.studies import trial as module
from cluster.studies.search import Search
from cluster.studies.trial import run_trial
from cluster.training.gradient import NonFinite
from tests.cluster.support.sweeps import search_in


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
