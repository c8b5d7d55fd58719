"""A sweep as a table: its trials, what they measured at the rungs, what was decided, and what they reached."""

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.runs.state import read_state
from cluster.studies.importance import importance
from cluster.studies.ledger import TrialRecord
from cluster.studies.search import Search
from cluster.studies.searchers import defined
from cluster.studies.space import value_text
from cluster.studies.sweep import Trial
from cluster.telemetry.receipt import read_receipt

WIDTH = 200
"""Columns where there is no terminal."""


def sweep_console() -> Console:
    """Where tables of sweeps are shown."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def sweep_table(search: Search, states: Mapping[int, str], more: Mapping[int, Trial] | None = None) -> Table:
    """A line for each trial, the best one marked.

    Args:
        search: the sweep.
        states: what is known of trials beside the ledger: number -> "RUNNING", or why it failed.
        more: trials that will be, and are in no ledger yet.
    """
    head, rows = sweep_cells(search, states, more or {})
    table = Table(title=sweep_title(search), title_justify="left")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if search.opened.sweep.halving:
        table.caption = "\n".join(rung_lines(search))
        table.caption_justify = "left"
    return table


def sweep_title(search: Search) -> str:
    """What is swept, and by what it is judged."""
    sweep = search.opened.sweep
    metrics = ", ".join(f"{name} ({mode})" for name, mode in sweep.metrics.items())
    return f"sweep {sweep.name}: {metrics} on val"


def sweep_cells(search: Search, states: Mapping[int, str], more: Mapping[int, Trial]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table, of the arguments of `sweep_table`."""
    sweep, records = search.opened.sweep, search.ledger.trials
    halving, winner = sweep.halving, search.best()
    rungs = [f"at {items}" for items in halving.rungs] if halving else []
    rows = []
    for number in sorted(records):
        record = records[number]
        values = [value_text(record.point[key]) if key in record.point else "" for key in sweep.space]
        errors = [f"{record.error(rung):.5f}{_mark(record, rung)}" if rung in record.rungs else "" for rung in range(len(rungs))]
        scores = [_score(record, metric) for metric in sweep.metrics]
        best = "best" if record is winner else ""
        rows.append([best, str(number), *values, *errors, *scores, record.run, _state(search, record, states.get(number, ""))])
    for number, trial in more.items():
        values = [value_text(trial.point[key]) if key in trial.point else "" for key in sweep.space]
        rows.append(["", str(number), *values, *([""] * (len(rungs) + len(sweep.metrics))), trial.run, "PENDING"])
    return ["", "trial", *sweep.space, *rungs, *sweep.metrics, "run", "state"], rows


def importances(search: Search) -> tuple[str, dict[str, float]]:
    """Of what, and how much of it is each key's share, the largest first: of the first rung where there is one, which all trials reach."""
    sweep, records = search.opened.sweep, [search.ledger.trials[number] for number in sorted(search.ledger.trials)]
    out = ""
    if sweep.halving:
        measured = [record for record in records if 0 in record.rungs]
        pairs = [(record.point, record.error(0)) for record in measured if record.finite(0)]
        what = f"the error at {sweep.halving.rungs[0]} items"
        out = f", without {len(measured) - len(pairs)} whose error is not finite" if len(pairs) < len(measured) else ""
    else:
        scored = [(record.point, defined(record.scores, [sweep.first_metric])) for record in records]
        pairs, what = [(point, values[0]) for point, values in scored if values], sweep.first_metric
    shares = importance(search.opened.space, [point for point, _ in pairs], [value for _, value in pairs])
    return f"share of the variance of {what} over {len(pairs)} trials{out}", dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def importance_table(search: Search) -> Table | None:
    """How much each key matters, None if nothing can be said."""
    title, shares = importances(search)
    if not shares:
        return None
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("key")
    table.add_column("share", justify="right")
    for key, share in shares.items():
        table.add_row(key, f"{share:.0%}")
    return table


def cost_lines(search: Search) -> list[str]:
    """What all runs of a sweep have cost so far, those of shared autoencoders too, by the receipts in their folders; none without one."""
    trials = [search.trial(number) for number in search.ledger.trials]
    runs = {one.run.name for trial in trials for one in (trial.experiment, trial.first) if one}
    receipts = [made for run in sorted(runs) if (made := read_receipt(search.opened.home.at(f"runs/{run}")))]
    if not receipts:
        return []
    held, cost, unpriced = (math.fsum(made[key] for made in receipts) for key in ("held", "cost", "unpriced"))
    unknown = f" (no price is known for {unpriced / 3600:.1f} of them)" if unpriced >= 1 else ""
    rest = len(runs) - len(receipts)
    without = f"; {rest} more {'has' if rest == 1 else 'have'} no receipt yet" if rest else ""
    what = f"all runs together: ${cost:.2f} for {held / 3600:.1f} hours of workers{unknown}"
    return [f"{what}, by the receipts of {len(receipts)} runs{without}"]


class LiveSweep:
    """Shows a sweep that is under way: a table on a terminal, elsewhere a line for each thing that happens."""

    def __init__(self) -> None:
        self._console = sweep_console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.update(Group())  # the table at the end says it all
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, soft_wrap=True)

    def show(self, search: Search, states: Mapping[int, str]) -> None:
        """How it stands now."""
        if self._live:
            self._live.update(sweep_table(search, states), refresh=True)
            return
        for number in sorted(search.ledger.trials):
            for line in _news(search.ledger.trials[number], states.get(number, "")):
                if line not in self._said:
                    self._said.add(line)
                    self.say(line)


def _news(record: TrialRecord, state: str) -> list[str]:
    name = f"trial {record.number}"
    lines = [f"{name} starts: {record.run}"] if state == "RUNNING" else []
    lines += [f"{name} ({record.run}) is not done: {state}"] if state not in ("", "RUNNING") and not record.end else []
    lines += [f"{name} at {facts['progress']} items: error {record.error(rung):.5f}" for rung, facts in sorted(record.rungs.items())]
    stopped = record.standing.stopped_at
    lines += [f"{name} is {record.choices[stopped].why}"] if stopped is not None else []
    return lines + ([f"{name} is at its end: {record.end} {record.why}".rstrip()] if record.end in ("DONE", "FAILED") else [])


def _mark(record: TrialRecord, rung: int) -> str:
    return "" if rung not in record.choices else "" if record.choices[rung].goes_on else " x"


def _score(record: TrialRecord, metric: str) -> str:
    if record.scores is None or record.standing.stopped_at is not None:
        return ""
    value = defined(record.scores, [metric])
    return f"{value[0]:.4f}" if value else "undefined"


def _state(search: Search, record: TrialRecord, known: str) -> str:
    if (stopped := record.standing.stopped_at) is not None:
        return record.choices[stopped].why
    if record.end or known:
        return f"{record.end or known} {record.why}".strip() if record.end or known == "RUNNING" else f"FAILED {known}"
    state = read_state(search.opened.home.at(f"runs/{record.run}"))
    if state is None:
        return "PENDING"
    return f"{'STOPPED' if state.status == 'DONE' else state.status} {state.why}".strip()  # done, but not to this end or question


def rung_lines(search: Search) -> list[str]:
    """What the errors of the table are, and what pairing is worth."""
    records = search.ledger.trials.values()
    measured = [facts for record in records for facts in record.rungs.values()]
    if not measured:
        return []
    asked = [level for level, _ in measured[0]["levels"]]
    used = {tuple(round(got, 2) for _, got in facts["levels"]) for facts in measured}
    steps = "; ".join(", ".join(f"{got:g}" for got in each) for each in sorted(used))
    lines = [f"errors: of the decoded x0 prediction, at log-SNR {', '.join(f'{level:g}' for level in asked)} (nearest steps: {steps})"]
    ratios = [choice.smaller for record in records for choice in record.choices.values() if choice.smaller]
    if ratios:
        middle = sorted(ratios)[len(ratios) // 2]
        lines.append(f"the variance of paired differences is {middle:.3g} times below unpaired (median of {len(ratios)} comparisons)")
    return lines
