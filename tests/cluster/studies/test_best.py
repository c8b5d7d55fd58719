"""best.yaml says whose answer it is, whether it may still change, and is an experiment for jobs/train.py."""

from pathlib import Path

import pytest

from cluster.config.loading import load
from cluster.studies.best import BEST, delete_other_best, write_best
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep
from tests.cluster.support.sweeps import search_in


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return search_in(tmp_path, halving=None)


def written(search: Search, number: int, score: float | None) -> str:
    """The comment of best.yaml after a trial has come to its end."""
    search.ledger.enter_end(number, "DONE", scores={"FRDist": score})
    search.refresh()
    write_best(search)
    return search.opened.store.read(BEST).decode().splitlines()[0] if search.opened.store.exists(BEST) else ""


def test_it_is_provisional_until_no_other_trial_may_win(search: Search, tmp_path: Path) -> None:
    named = f"# sweep shown, ledger {search.ledger.url.rpartition('/')[2]}: "
    assert written(search, 1, None) == ""
    assert written(search, 2, 2.0) == f"{named}provisional, trials not settled yet: 0; the best so far is trial 2"
    assert written(search, 0, 1.0) == f"{named}the best is trial 0"
    assert load(Path(search.opened.store.url) / BEST).run.name == search.ledger.trials[0].run


def test_the_answer_to_another_question_is_deleted_and_ones_own_is_not(search: Search) -> None:
    assert written(search, 0, 1.0)
    opened = search.opened
    delete_other_best(opened)
    assert opened.store.exists(BEST)
    other = OpenSweep(opened.sweep.model_copy(update={"metrics": {"FRCorr": "max"}}), opened.overrides)
    for _ in range(2):
        delete_other_best(other)
        assert not opened.store.exists(BEST)
