"""The page about a run: everything is in it, it asks for nothing, and what a run says cannot become a tag."""

import json
import re
from pathlib import Path

import pytest

from cluster.evaluation.report import REPORT, _timeline, report, write_report
from cluster.runs.state import State, open_life, write_state
from cluster.storage import Store, open_store
from cluster.telemetry.books import Berth, Books
from cluster.telemetry.books_log import read_books
from cluster.telemetry.metrics_log import MetricsLog
from reactdiff.metrics.official import OFFICIAL
from tests.cluster.support.html import Tags, assert_asks_for_nothing
from tests.cluster.telemetry.test_meter import Clock


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run of two lives with curves, faults, scores and a picture; its name would be a tag."""
    store = open_store(str(tmp_path / "runs" / "a&b"))
    store.put("config.yaml", b"seed: 1 # <script>alert(1)</script>\nevaluation: {split: test, predictions: 10}\n")
    for _ in range(2):
        life = open_life(store, {})
    write_state(store, State("FAILED", life, "d", "m", "diffusion", "rank 1 <b>hangs</b>"))
    log = MetricsLog(store, 1, 0, "autoencoder")
    for step in range(3000):
        log.add(progress=10 * step, loss=1.0 / (step + 1))
    log.flush()
    scores = MetricsLog(store, 1, 0, "val-diffusion")
    scores.add(progress=10, FRCorr=0.25, FRDist=3.5)
    scores.flush()
    for number in (1, 2):
        clock = Clock(1000.0 * number)
        books = Books(number, clock)
        clock.now += 300
        books.book("autoencoder", {"compute": 250_000, "data_wait": 50_000}, books.now(), Berth("host", 3.6, 1.0))
        fault = books.fault("hang", "autoencoder", "<i>stuck</i>")
        books.book("autoencoder", {"recovery": 10_000}, books.now(), Berth("host", 3.6, 1.0), fault)
        store.put(f"books/{number:06d}.json", json.dumps(books.record()).encode())
    official = dict.fromkeys(OFFICIAL, 0.125) | {"FRSyn": None}
    rows = {"model": {"official": official}, "a random listener": {"official": official}}
    facts = {"split": "test", "clips": 4, "predictions": 10, "scores": rows}
    store.put("evaluation/test-0123.json", json.dumps(facts).encode())
    store.put("evaluation/test-0123.png", b"\x89PNG")
    return store


def test_the_page_has_what_the_folder_has(run: Store) -> None:
    page = report(run)
    for said in ("Loss of stage autoencoder", "on clips of val", "Scores on split test", "random listener", "0.125"):
        assert said in page
    assert "2 lives, 21.7 min of wall time, 11.7 min of it without a driver" in page and "$0.62" in page
    assert page.count("<svg") == 3 and "data:image/png;base64,iVBORw" in page
    assert len(page) < 3_000_000 and max(map(len, re.findall(r'd="([^"]*)"', page))) < 40_000, "a curve has a few hundred points"


def test_of_several_evaluations_that_of_the_configuration_is_shown(run: Store) -> None:
    facts = json.loads(run.read("evaluation/test-0123.json"))
    for name, changed in (
        ("val-0000", {"split": "val"}),
        ("test-ffff", {"predictions": 3}),
        ("test-eeee", {"otherwise": {"sampler": "ddpm"}}),
    ):
        run.put(f"evaluation/{name}.json", json.dumps({**facts, **changed, "scores": {}}).encode())
    page = report(run)
    assert "Scores on split test" in page and "random listener" in page


def test_each_state_is_named_once_also_where_the_first_life_booked_nothing(run: Store) -> None:
    run.put("books/000001.json", json.dumps(Books(1, Clock(900.0)).record()).encode())
    assert _timeline(read_books(run)).count("data wait") == 1


def test_it_asks_for_nothing_and_what_a_run_says_stays_text(run: Store) -> None:
    page = report(run)
    assert_asks_for_nothing(page)
    assert "&lt;script&gt;" in page and "&lt;b&gt;hangs&lt;/b&gt;" in page and "&lt;i&gt;stuck&lt;/i&gt;" in page and "a&amp;b" in page


def test_the_same_folder_makes_the_same_page(run: Store) -> None:
    assert report(run) == report(run)
    assert write_report(run) == f"{run.url}/{REPORT}" and run.read(REPORT).decode() == report(run)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("config.yaml", b"seed: 1\nevaluation: {split: test, predictions: 10}\n")
    write_state(store, State("RUNNING", open_life(store, {}), "d", "m"))
    Tags(report(store))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ended before it began"):
        report(open_store(str(tmp_path)))
