"""Make a dataset to train on: simulate a tree of clips, or turn a tree in the official REACT 2024 layout into shards.

  python jobs/prepare.py simulate work/tree
  python jobs/prepare.py react2024 work/tree work/shards           (or s3://bucket/prefix)

Every clip is checked; a clip that cannot be used is left out and listed with file and reason. The same command again goes on
after an interruption, says so when there is nothing to do, and adds the clips that are new in the tree: shards that exist are
never rewritten, so a dataset may grow under running jobs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster import command
from cluster.placement import connect
from cluster.prepare import Prepared, Refused, prepare
from cluster.storage import open_store
from reactdiff.data.react2024 import Tree
from reactdiff.data.synthetic import Simulation, write_tree


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do the verb."""
    options = _parser().parse_args(arguments)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    (_simulate if options.verb == "simulate" else _react2024)(options, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    usual = Simulation()
    simulate = verbs.add_parser("simulate", help="write a tree of dyads that react to each other, in the official layout")
    simulate.add_argument("root", metavar="ROOT", help="folder of the tree; a simulation there goes on, or grows")
    counts = ",".join(f"{split}={count}" for split, count in usual.clips.items())
    simulate.add_argument(
        "--clips",
        type=_clips,
        default=usual.clips,
        metavar="SPLIT=N,...",
        help=f"dyads of each split: train, val, gate, test (default: {counts})",
    )
    simulate.add_argument(
        "--frames", type=int, default=usual.frames, metavar="T", help=f"frames of a clip, 25 a second (default: {usual.frames})"
    )
    simulate.add_argument("--seed", type=int, default=usual.seed, metavar="S", help=f"seed of everything random (default: {usual.seed})")
    react = verbs.add_parser("react2024", help="turn a tree in the official layout into a dataset of shards")
    react.add_argument("root", metavar="ROOT", help="folder that holds train.csv, val.csv, ... (docs/data.md has the layout)")
    react.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix of the dataset")
    react.add_argument("--strict", action="store_true", help="fail, and publish nothing, if any clip cannot be used")
    react.add_argument("--clips-per-shard", type=command.positive, default=64, metavar="N", help="clips of each new shard (default: 64)")
    return parser


def _simulate(options: argparse.Namespace, console: Console) -> None:
    simulation = Simulation(seed=options.seed, frames=options.frames, clips=options.clips)
    with _progress("simulating clips", console) as progress:
        write_tree(simulation, command.absolute(options.root), progress)
    counts = ", ".join(f"{count} {split}" for split, count in simulation.clips.items())
    console.print(f"{options.root}: {counts} clips of {simulation.frames} frames, seed {simulation.seed}")
    console.print(f"next: python jobs/prepare.py react2024 {options.root} URL")


def _react2024(options: argparse.Namespace, console: Console) -> None:
    tree, store = Tree(command.absolute(options.root)), open_store(command.absolute(options.url))
    console.print(f"{options.root}: clips of {tree.frames} frames, streams {', '.join(f'{s.name} {s.width}' for s in tree.streams)}")
    connect()
    try:
        with _progress("preparing clips", console) as progress:
            done = prepare(tree, store, clips_per_shard=options.clips_per_shard, strict=options.strict, progress=progress)
    except Refused as error:
        _list_refused(error.clips, console)
        raise
    if done.refused:
        _list_refused(done.refused, console)
    _summarise(done, store.url, console)


def _summarise(done: Prepared, url: str, console: Console) -> None:
    console.print(f"dataset {url}, state {done.manifest.hash}")
    table = Table()
    for column in ("split", "clips", "added", "shards", "MB", "refused"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, part in done.manifest.splits.items():
        refused = sum(entry[0] == split for entry in done.refused)
        numbers = (sum(part.shards.clips), done.added[split], len(part.shards))
        table.add_row(split, *map(str, numbers), f"{sum(part.shards.bytes) / 1e6:.1f}", str(refused))
    console.print(table)
    if not any(done.added.values()):
        console.print("nothing to add: the dataset already holds every usable clip of the tree")


def _list_refused(clips: Sequence[tuple[str, str, str]], console: Console) -> None:
    console.print("clips that cannot be used:")
    table = Table()
    table.add_column("split")
    table.add_column("reason", overflow="fold")
    for split, _, reason in clips:
        table.add_row(split, reason)
    console.print(table)


@contextmanager
def _progress(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere nothing but the last line of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _clips(text: str) -> dict[str, int]:
    try:
        return {split: int(count) for split, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be like train=400,val=60,test=60") from None


if __name__ == "__main__":
    sys.exit(command.run(main))
