"""Sweep a grid: each combination is a run like any other, compared with the others on the val split.

  python jobs/tune.py                                              (jobs/configs/sweep.yaml, over the demo's data)
  python jobs/tune.py --config jobs/configs/sweep.yaml --dry-run optim.epochs=2

The same command goes on after an interruption: scored trials are skipped, others resume where they were. While another process is
at the same sweep it says so and ends, with exit code 0. The best trial's
experiment is <run.store>/sweeps/<name>/best.yaml: `python jobs/train.py --config` on it scores it on the experiment's own split,
and trains it further if optim.epochs is raised.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import cli
from cluster.runs.lease import Held
from cluster.studies.sweep import Outcome, Sweep, best, open_home, outcome, search, sweep_folder, trials
from cluster.telemetry.display import Display

CONFIG = Path(__file__).parent / "configs" / "sweep.yaml"


def main() -> int:
    """Parse the command line and bring the sweep to its end."""
    parser = cli.study_parser(__doc__, "sweep", CONFIG)
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the trials, start nothing")
    arguments = parser.parse_args()
    sweep, overrides = Sweep.read(arguments.config), arguments.overrides
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    home = open_home(sweep, overrides)
    if arguments.dry_run:
        console.print(table(sweep, [outcome(sweep, trial, home) for trial in trials(sweep, overrides)]))
        return 0
    with Display() as display:
        try:
            outcomes = search(sweep, overrides, display)
        except Held as held:
            display.say(str(held))
            return 0
    console.print(table(sweep, outcomes))
    if best(sweep, outcomes) is not None:
        store = sweep_folder(sweep, home)
        fetch = f"aws s3 cp {store.url}/best.yaml . && " if "://" in store.url else ""
        command_line = f"{fetch}python jobs/train.py --config {'' if fetch else store.url + '/'}best.yaml"
        console.print(f"the best one, on the experiment's own split: {command_line}")
    if undone := [one.trial.run for one in outcomes if one.state != "DONE"]:
        what = f"{len(undone)} of {len(outcomes)} trials are not done ({', '.join(undone)})"
        print(f"error: {what}; the same command goes on with them", file=sys.stderr)
    return 1 if undone else 0


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Table:
    """A line for each trial, the best one marked."""
    winner = best(sweep, outcomes)
    lines = Table(title=f"sweep {sweep.name}: {sweep.metric} on val, {sweep.mode}", title_justify="left")
    for column in ("", *sweep.grid, sweep.metric, "run", "state"):
        lines.add_column(column, overflow="fold")
    for one in outcomes:
        value = one.value(sweep.metric)
        parameters = [v if isinstance(v, str) else json.dumps(v) for v in one.trial.parameters.values()]
        score = f"{value:.4f}" if value is not None else "undefined" if one.scores else ""
        lines.add_row("best" if one is winner else "", *parameters, score, one.trial.run, f"{one.state} {one.why}".strip())
    return lines


if __name__ == "__main__":
    sys.exit(cli.run(main))
