"""The page about a sweep has its trials, rungs and fronts; it asks for nothing."""

from pathlib import Path

import pytest

from cluster.studies.search import Search
from cluster.studies.sweep_report import _rung_curves, front, sweep_report, write_sweep_report
from tests.cluster.support.html import assert_asks_for_nothing
from tests.cluster.support.sweeps import rung, search_in, search_with_a_diverged_trial


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return search_in(tmp_path)


def test_the_page_of_a_sweep_that_has_ended(search: Search) -> None:
    for number, worse in enumerate((0.0, 0.05, 0.0)):
        search.ledger.enter_rung(number, 0, rung(12, worse))
    search.refresh()
    for number in (0, 2):
        search.ledger.enter_rung(number, 1, rung(20, 0.0))
        search.ledger.enter_end(number, "DONE", scores={"FRDist": 1.25 + number, "FRCorr": 0.5 - number, "FRSyn": None})
    search.ledger.enter_end(1, "STOPPED", "stopped at rung 1")
    search.refresh()
    page = sweep_report(search, {})
    assert_asks_for_nothing(page)
    assert '<tr class="best"><td>best</td><td>0</td><td>unet</td>' in page and '<tr class="out"><td></td><td>1</td>' in page
    assert page.count("<svg") == 3 and "the error at 10 items over 3 trials" in page and "denoiser: unet" in page
    assert "FRDist against the other metrics" in page and ">FRCorr<" in page and ">FRSyn<" not in page, "it is undefined"
    assert len(page) < 3_000_000 and page == sweep_report(search, {})
    assert Path(write_sweep_report(search, {})).read_text() == page


def test_a_sweep_that_has_just_begun_has_a_page(search: Search) -> None:
    page = sweep_report(search, {0: "RUNNING", 1: "<b>lost</b>"})
    assert_asks_for_nothing(page)
    assert page.count("<svg") == 0 and "RUNNING" in page and "&lt;b&gt;lost" in page and "Configuration of" not in page


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.5, 2.0), (2.0, 3.0)]
    assert front(points, ("max", "max")) == [(2.0, 3.0), (3.0, 2.0)]
    assert front(points, ("min", "max")) == [(1.0, 1.0), (2.0, 3.0)]
    assert front(points, ("min", "min")) == [(1.0, 1.0)]


def test_errors_that_are_not_finite_are_left_out_of_the_curves_and_counted(tmp_path: Path) -> None:
    search = search_with_a_diverged_trial(tmp_path)
    records = list(search.ledger.trials.values())
    assert _rung_curves(records, None) == _rung_curves([*records[:5], *records[6:]], None) != "" == _rung_curves(records[5:6], None)
    assert "Left out: errors of 1\ntrial that are not finite" in sweep_report(search, {})
