"""Look after the checkpoints of a run: which there are, whether they are whole, weights out of one, and what can be deleted.

  python jobs/checkpoint.py list demo-1a2b3c4d                       a run by its name, below work/store
  python jobs/checkpoint.py verify s3://bucket/store/runs/NAME       by its folder or URL; reads every byte, 1 if some are damaged
  python jobs/checkpoint.py export demo-1a2b3c4d --stage diffusion --progress 4800 --out weights.safetensors
  python jobs/checkpoint.py gc demo-1a2b3c4d                         what could go; --yes deletes it

A run goes on from the checkpoint with the most progress that is whole and counts, and keeps those that its configuration asks for:
run.keep (the last ones), run.keep_every (one in every so many items, for good), run.keep_best (by the score of evaluation.watch),
diffusion.ema_every (for averages of any length).
Training deletes the others by itself. What is left to gc is what was never deleted because a run was killed or its configuration has
changed since: give that to jobs/train.py first, config.yaml in the run's folder is what counts here. A checkpoint that does not count
was written by a driver or a rank that another one had replaced already.

list, verify and export change nothing and may be used while the run is trained. gc holds the run's lease, so it ends with 75 while
somebody trains the run, and with --yes it takes a life number, as a driver does. While a manifest cannot be read it deletes no part.
Names and sizes are what gc goes by: verify first, if files may be damaged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Column, Table

from cluster import cli
from cluster.runs.inventory import Inventory
from cluster.runs.retention import METRIC, Retention
from cluster.runs.saved import open_folder, open_run
from cluster.runs.upkeep import Weights, choose_checkpoint, clearing, export_checkpoint, inventories, verify_checkpoints
from cluster.telemetry.display import Display
from reactdiff.config import STAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do the verb."""
    options = _parser().parse_args(arguments)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    return {"list": _list, "verify": _verify, "export": _export, "gc": _gc}[options.verb](options, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {
        "list": "progress, writer, size, whether it is whole, score, and why it stays",
        "verify": "read every part of what counts and compare it with its hash; exit code 1 if anything is damaged",
        "export": "the weights of a checkpoint as one safetensors file, with its description in the metadata",
        "gc": "what attempts that are over left behind, and checkpoints that need not stay",
    }
    verb = {}
    for name, text in texts.items():
        verb[name] = verbs.add_parser(name, help=text, description=text)
        cli.add_run(verb[name])
    export = verb["export"]
    export.add_argument("--stage", choices=STAGES, help="whose weights (default: the last stage that has a whole checkpoint)")
    export.add_argument("--progress", type=int, metavar="ITEMS", help="of the checkpoint, as `list` prints it (default: the most there is)")
    export.add_argument(
        "--weights", choices=get_args(Weights), default="average", help="averaged ones, which are scored, or the optimiser's own"
    )
    export.add_argument(
        "--length", type=float, default=0.0, metavar="SHARE", help="of averaged ones: another length, of a run with diffusion.ema_every"
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="local file (default: NAME-STAGE-PROGRESS.safetensors here)")
    verb["gc"].add_argument("--yes", action="store_true", help="delete it")
    return parser


def _list(options: argparse.Namespace, console: Console) -> int:
    experiment, _, store = open_folder(options.run, options.store)
    heads = ("stage", "progress", "written by", "MB", "state", METRIC, "counts", "stays as")
    right = {"progress", "MB", METRIC}
    table = Table(*(Column(head, justify="right" if head in right else "left", no_wrap=head != "state") for head in heads))
    for stage, inventory in inventories(store, experiment).items():
        why = Retention.of(experiment, stage).kept(inventory.found)
        for one in sorted(inventory.found, key=lambda one: (one.progress, one.by)):
            score = "-" if one.score is None else f"{one.score:.4f}"
            size, state = f"{one.bytes / 1e6:.1f}", one.wrong or "whole"
            table.add_row(stage, str(one.progress), str(one.by), size, state, score, "yes" if one.counts else "no", why.get(one.key, "-"))
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    experiment, _, store = open_folder(options.run, options.store)
    there = inventories(store, experiment)
    with Display() as display:
        wrong = verify_checkpoints(store, there, display.counter("verify", "parts"))
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    if not wrong:
        console.print(f"{_count(there)} are whole")
    return 1 if wrong else 0


def _count(there: dict[str, Inventory]) -> str:
    counts = {stage: sum(one.counts for one in inventory.found) for stage, inventory in there.items()}
    return f"{' and '.join(f'{count} of stage {stage}' for stage, count in counts.items())}: all checkpoints that count"


def _export(options: argparse.Namespace, console: Console) -> int:
    run = open_run(options.run, options.store)
    found = choose_checkpoint(run.store, inventories(run.store, run.experiment), options.stage, options.progress)
    path = options.out or Path(f"{run.experiment.run.name}-{found.stage}-{found.progress}.safetensors")
    if options.length and options.weights != "average":
        raise ValueError(f"--length {options.length:g} is of averaged weights: leave out --weights {options.weights}")
    export_checkpoint(run, found, options.weights, path, options.length)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    console.print(f"{path}: {options.weights} weights of stage {found.stage} at progress {found.progress}, {size}")
    return 0


def _gc(options: argparse.Namespace, console: Console) -> int:
    experiment, home, store = open_folder(options.run, options.store)
    home.assert_conditional_writes()
    with clearing(store, experiment, options.yes) as (garbage, delete):
        for key, size in garbage.items():
            console.print(f"{size / 1e6:>10.1f} MB  {key}")
        if options.yes:
            delete()
    done = "deleted" if options.yes else "can go"
    more = "" if options.yes or not garbage else "; nothing was deleted, --yes does it"
    console.print(f"{len(garbage)} objects, {sum(garbage.values()) / 1e6:.1f} MB, {done}{more}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
