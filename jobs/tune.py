"""Sweep a space: each trial is a run like any other, compared with the others on the val split.

  python jobs/tune.py                                              (jobs/configs/sweep.yaml, over the demo's data)
  python jobs/tune.py --config jobs/configs/sweep.yaml --dry-run optim.epochs=2

The same command goes on after an interruption: finished trials are skipped, others resume where they were, and every decision is the one
that would have been taken. Ctrl-C once lets the trials that run write a checkpoint first. While another process is at the same sweep it
says so and ends, with exit code 0 (75 with --give-up, which is then not done). It ends with 75 where trials are left with which the same
command may go on by itself, as after the loss of a machine, and with 1 where a person must act first, also where no trial has a score. A
trial that cannot come to its end holds back decisions, suggestions and the best one: --give-up N enters it as failed.

The best trial's experiment is <run.store>/sweeps/<name>/best.yaml: `python jobs/train.py --config` on it scores it on the experiment's
own split, and trains it further if optim.epochs is raised. It begins with a comment: while trials are not done it is provisional.
"""

import sys
from pathlib import Path

from cluster import cli
from cluster.runs.lease import Held
from cluster.runtime.failures import AGAIN, PERSON
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep
from cluster.studies.sweep_report import write_sweep_report
from cluster.studies.sweep_table import LiveSweep, cost_lines, importance_table, sweep_console, sweep_table
from cluster.studies.tuner import Undone, run_sweep

CONFIG = Path(__file__).parent / "configs" / "sweep.yaml"


def main() -> int:
    """Parse the command line and bring the sweep to its end."""
    parser = cli.study_parser(__doc__, "sweep", CONFIG)
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the trials, start nothing")
    what = "enter trial N as failed, where it cannot come to its end and others wait for it; may be given several times"
    parser.add_argument("--give-up", type=int, action="append", default=[], metavar="N", help=what)
    arguments = parser.parse_args()
    sweep, overrides = Sweep.read(arguments.config), arguments.overrides
    if arguments.dry_run:
        return dry_run(OpenSweep(sweep, overrides))
    with LiveSweep() as live:
        try:
            search, undone = run_sweep(sweep, overrides, live.say, live.show, arguments.give_up)
        except Held as held:
            live.say(str(held))
            if not arguments.give_up:
                return 0
            numbers = ", ".join(map(str, arguments.give_up))
            live.say(f"so trial {numbers} is not given up: end that process first (Ctrl-C), and give this command again")
            return AGAIN
    return report(search, undone)


def dry_run(opened: OpenSweep) -> int:
    """Say which trials there are and will be."""
    opened.ledger.refresh()
    trials = opened.known_trials(opened.ledger)
    opened.check(trials)
    more = {trial.number: trial for trial in trials if trial.number not in opened.ledger.trials}
    console = sweep_console()
    console.print(sweep_table(Search(opened, reading=True), {}, more))
    if len(trials) < opened.sweep.most:
        console.print(f"and up to {opened.sweep.most - len(trials)} more, which search: {opened.sweep.search} proposes as scores come in")
    return 0


def report(search: Search, undone: dict[int, Undone]) -> int:
    """Print what came of it."""
    console = sweep_console()
    console.print(sweep_table(search, {number: one.why for number, one in undone.items()}))
    for line in cost_lines(search):
        console.print(line)
    if (matters := importance_table(search)) is not None:
        console.print(matters)
    if search.leader() is not None:
        so_far = "" if search.over() else " so far"
        store = search.opened.store
        fetch = f"aws s3 cp {store.url}/best.yaml . && " if "://" in store.url else ""
        command_line = f"{fetch}python jobs/train.py --config {'' if fetch else store.url + '/'}best.yaml"
        console.print(f"the best one{so_far}, on the experiment's own split: {command_line}")
    console.print(f"as a page: {write_sweep_report(search, {number: one.why for number, one in undone.items()})}", soft_wrap=True)
    stopped = [number for number, record in search.ledger.trials.items() if record.standing.stopped_at is not None]
    if left := [number for number in search.unfinished() if number not in stopped]:  # one that is stopped has nothing left to say
        runs = ", ".join(f"{number}: {search.ledger.trials[number].run}" for number in left)
        print(
            f"error: {len(left)} of {len(search.ledger.trials)} trials are not done ({runs}); the same command goes on, and with "
            "--give-up N without trial N, which holds back what waits for it",
            file=sys.stderr,
        )
        return PERSON if any(undone[number].code == PERSON for number in left if number in undone) else AGAIN
    if search.over() and search.best() is None:
        metric = search.opened.sweep.first_metric
        print(
            f"error: no trial of sweep {search.opened.sweep.name} has a defined {metric}, so none is the best: the table says how they "
            "ended. Name another metric first, change the space, or mend what failed under another name of the sweep",
            file=sys.stderr,
        )
        return PERSON
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
