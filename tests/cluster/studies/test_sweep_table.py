"""What is shown of a sweep: every trial with its rungs, why it was stopped, what pairing is worth, and each thing that happens once."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.studies.search import Search
from cluster.studies.sweep_report import sweep_report
from cluster.studies.sweep_table import LiveSweep, cost_lines, importance_table, importances, sweep_table
from cluster.telemetry.receipt import RECEIPT
from tests.cluster.support.sweeps import rung, search_in, search_with_a_diverged_trial


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return search_in(tmp_path)


def shown(what: Any) -> str:
    console = Console(width=200, file=io.StringIO(), markup=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(text: str, number: int) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith("│") and row.split("│")[2].strip() == str(number)]
    return [cell.strip() for cell in found.split("│")[1:-1]]


def test_the_table_has_each_trial_its_rungs_and_why_it_was_stopped(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    live = LiveSweep()
    live.show(search, {0: "RUNNING"})
    for number, worse in enumerate((0.0, 0.05, 0.0)):
        search.ledger.enter_rung(number, 0, rung(12, worse))
    search.refresh()
    live.show(search, {0: "RUNNING"})
    search.ledger.enter_rung(0, 1, rung(20, 0.0))
    search.ledger.enter_end(0, "DONE", scores={"FRDist": 1.25})
    search.ledger.enter_end(1, "STOPPED", "stopped at rung 1")
    search.refresh()
    live.show(search, {})
    text = shown(sweep_table(search, {2: "the machine is gone"}))
    assert line(text, 0)[2:7] == ["unet", "", "0.43500", "0.43500", "1.2500"] and line(text, 0)[-1] == "DONE"
    assert line(text, 1)[2:7] == ["transformer", "2", "0.46000 x", "", ""]
    assert line(text, 1)[-1] == "stopped at rung 1: trial 0 is better, p = 0.0039 (at most 0.025)"
    assert line(text, 2)[-1] == "FAILED the machine is gone"
    assert "at log-SNR 0, 3 (nearest steps: -0.12, 2.71)" in text and "times below unpaired (median of 1 comparisons)" in text
    said = capsys.readouterr().out.splitlines()
    assert [one for one in said if one.startswith("trial 1")] == [
        "trial 1 at 12 items: error 0.46000",
        "trial 1 is stopped at rung 1: trial 0 is better, p = 0.0039 (at most 0.025)",
    ]
    assert sum(one.startswith("trial 0 starts") for one in said) == 1 and said[-1] == "trial 0 is at its end: DONE"


def test_a_trial_that_fails_is_told_when_it_does_and_not_at_the_end(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    live, run = LiveSweep(), search.ledger.trials[1].run
    for state in ("RUNNING", "out of memory", "out of memory"):
        live.show(search, {1: state})
    assert capsys.readouterr().out.splitlines() == [f"trial 1 starts: {run}", f"trial 1 ({run}) is not done: out of memory"]


def test_importance_is_that_of_the_first_rung_which_every_trial_reaches(search: Search) -> None:
    assert importance_table(search) is None
    for number, worse in enumerate((0.0, 0.05, 0.05)):
        search.ledger.enter_rung(number, 0, rung(12, worse))
    search.refresh()
    text = shown(importance_table(search))
    assert "share of the variance of the error at 10 items over 3 trials" in text
    assert re.search(r"model\.denoiser\s+│\s+100%", text)


def test_a_trial_whose_error_is_not_finite_is_left_out_of_what_matters_and_counted(tmp_path: Path) -> None:
    search = search_with_a_diverged_trial(tmp_path)
    title, shares = importances(search)
    assert title == "share of the variance of the error at 10 items over 8 trials, without 1 whose error is not finite"
    assert shares["diffusion.schedule"] > 0.9 and shares["diffusion.condition_dropout"] < 0.1


def test_what_all_runs_cost_is_summed_those_of_shared_autoencoders_too(search: Search) -> None:
    assert cost_lines(search) == []
    trials = [search.trial(number) for number in range(3)]
    (shared,) = {trial.first.run.name for trial in trials if trial.first}
    for run, cost in ((trials[0].run, 1.25), (trials[2].run, 2.0), (shared, 4.0)):
        made = {"held": 3600.0, "cost": cost, "unpriced": 1800.0 if run == shared else 0.0}
        search.opened.home.put(f"runs/{run}/{RECEIPT}", json.dumps(made).encode())
    (line,) = cost_lines(search)
    assert line.startswith("all runs together: $7.25 for 3.0 hours of workers (no price is known for 0.5 of them)")
    assert line.endswith("by the receipts of 3 runs; 1 more has no receipt yet") and line in sweep_report(search, {})
