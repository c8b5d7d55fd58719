"""Make a dataset to train on: simulate a tree of clips, or turn a tree in the official REACT 2024 layout into shards.

  python jobs/prepare.py simulate work/tree
  python jobs/prepare.py react2024 work/tree work/shards           (or s3://bucket/prefix)
  python jobs/prepare.py index s3://bucket/tars                    the same for WebDataset tars that lie there already
  python jobs/prepare.py inspect work/shards                       what it holds; --keys lists its clips, --clip KEY shows one
  python jobs/prepare.py verify work/shards                        reads every byte and compares it with what was written

Every clip is checked; a clip that cannot be used is left out and listed with file and reason, and in a tar of another program it
refuses the dataset. The same command again goes on after an interruption and says so when there is nothing to do.

To append clips to a dataset, give the same command again when the tree has new clips, or the URL new tars: they become new shards
behind the old ones, and a new state of the dataset (a manifest). Shards are never rewritten and old states stay, so a dataset may grow
under running jobs: each keeps to the state it began with.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from cluster import cli
from cluster.config.paths import absolute
from cluster.config.schema import Workers
from cluster.data.index_tars import STREAM_KINDS, index_tars
from cluster.data.manifest import Manifest, load_manifest
from cluster.data.prepare import RefusedClips, prepare
from cluster.data.reader import Reader
from cluster.data.verify import verify
from cluster.runtime.ray_cluster import assert_visible, connect
from cluster.storage import open_store
from cluster.telemetry.display import Display
from reactdiff.clip import FRAME_RATE, PERSONS
from reactdiff.data.react2024 import Tree
from reactdiff.data.sample import StreamKind
from reactdiff.data.synthetic import Simulation, write_tree


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do the verb."""
    options = _parser().parse_args(arguments)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    verbs = {"simulate": _simulate, "react2024": _react2024, "index": _index, "inspect": _inspect, "verify": _verify}
    return verbs[options.verb](options, console)


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
    react.add_argument("--clips-per-shard", type=cli.positive, default=64, metavar="N", help="clips of each new shard (default: 64)")
    react.add_argument(
        "--one-to-many", action="store_true", help="keep who reacts appropriately in train, too, which diffusion.other_target needs"
    )
    found = verbs.add_parser("index", help="make a dataset of WebDataset tars that another program wrote, where they lie")
    found.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix that holds them as <split>/<name>.tar")
    for kind, what in (("facial", "face"), ("acoustic", "voice")):
        known = ", ".join(name for name in STREAM_KINDS if STREAM_KINDS[name] == kind)
        found.add_argument(f"--{kind}", type=_names, default=[], metavar="NAME,...", help=f"streams of the {what}, beside {known}")
    look = verbs.add_parser("inspect", help="say what a dataset holds: streams, splits, one clip")
    look.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix of the dataset")
    look.add_argument("--split", help="split of the clip, or of the keys (default: the first)")
    look.add_argument("--clip", metavar="KEY", help="clip that is shown (default: the first)")
    look.add_argument("--keys", action="store_true", help="print the keys of the split's clips, a line each, and nothing else")
    check = verbs.add_parser("verify", help="read a whole dataset and compare it with its hashes; exit code 1 if anything differs")
    check.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix of the dataset")
    return parser


def _simulate(options: argparse.Namespace, console: Console) -> int:
    simulation = Simulation(seed=options.seed, frames=options.frames, clips=options.clips)
    with Display() as display:
        write_tree(simulation, absolute(options.root), display.counter("simulate", "clips"))
    counts = ", ".join(f"{count} {split}" for split, count in simulation.clips.items())
    console.print(f"{options.root}: {counts} clips of {simulation.frames} frames, seed {simulation.seed}")
    console.print(f"next: python jobs/prepare.py react2024 {options.root} URL")
    return 0


def _react2024(options: argparse.Namespace, console: Console) -> int:
    if "://" in options.root:
        raise ValueError(
            f"{options.root} is no folder, and a tree is read from one: copy it here first (aws s3 sync {options.root} FOLDER); tars in a "
            "bucket need no tree: python jobs/prepare.py index --help"
        )
    tree, store = Tree(absolute(options.root)), open_store(absolute(options.url))
    console.print(f"{options.root}: clips of {tree.frames} frames, streams {', '.join(f'{s.name} {s.width}' for s in tree.streams)}")
    connect()
    assert_visible(store, "URL")
    try:
        with Display() as display:
            progress = display.counter("prepare", "clips")
            asked = {name: getattr(options, name) for name in ("clips_per_shard", "strict", "one_to_many")}
            done = prepare(tree, store, progress=progress, **asked)
    except RefusedClips as error:
        _list_refused(error.clips, console)
        raise
    if done.refused:
        _list_refused(done.refused, console)
    refused = {split: sum(entry[0] == split for entry in done.refused) for split in done.manifest.splits}
    _summarise(done.manifest, done.added, "refused", refused, store.url, console)
    if not any(done.added.values()):
        console.print("nothing to add: the dataset already holds every usable clip of the tree")
    return 0


def _index(options: argparse.Namespace, console: Console) -> int:
    store = open_store(absolute(options.url))
    kinds: dict[str, StreamKind] = {name: "facial" for name in options.facial}
    if twice := [name for name in options.acoustic if name in kinds]:
        raise ValueError(f"{twice[0]} cannot be a stream of both --facial and --acoustic")
    kinds |= {name: "acoustic" for name in options.acoustic}
    connect()
    assert_visible(store, "URL")
    with Display() as display:
        done = index_tars(store, kinds, display.counter("index", "tars"))
    _summarise(done.manifest, done.added, "ignored files", done.ignored, store.url, console)
    if not any(done.added.values()):
        console.print("nothing to add: the dataset already holds every tar")
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    store = open_store(absolute(options.url))
    manifest = load_manifest(store)
    split = options.split or next(iter(manifest.splits))
    reader = Reader(store, manifest, split)
    if options.keys:
        for keys in reader.keys():
            print(*(key.decode() for key in keys.tolist()), sep="\n")
        return 0
    console.print(f"dataset {store.url}, state {manifest.hash}, {manifest.frames} frames ({manifest.frames / FRAME_RATE:g} s) a clip")
    streams = Table("stream", "class", Column("width", justify="right"), title="what each person has", title_justify="left")
    for stream in manifest.streams:
        streams.add_row(stream.name, stream.kind, str(stream.width))
    for name, width in manifest.targets.items():
        streams.add_row(name, "target", str(width))
    splits = Table("split", *(Column(name, justify="right") for name in ("clips", "items", "shards", "GB")), "appropriateness", "subjects")
    for name, part in manifest.splits.items():
        clips, gigabytes = sum(part.shards.clips), sum(part.shards.bytes) / 1e9
        known = ["yes" if file else "no" for file in (part.appropriateness, part.subjects)]
        splits.add_row(name, f"{clips:,}", f"{2 * clips:,}", f"{len(part.shards):,}", f"{gigabytes:.3f}", *known)
    clip = reader.clip_number(options.clip) if options.clip else 0
    read = reader.read(clip, [(person, name) for person in PERSONS for name in (*(s.name for s in manifest.streams), *manifest.targets)])
    columns = [Column(name, justify="right") for name in ("shape", "type", "smallest", "mean", "largest")]
    arrays = Table("member", *columns, title=f"clip {reader.key(clip)} of {split}", title_justify="left")
    for (person, name), array in sorted(read.arrays.items()):
        exact = array.astype("float64")
        numbers = (f"{value:.4g}" for value in (exact.min(), exact.mean(), exact.max()))
        arrays.add_row(f"{person}.{name}", " x ".join(map(str, array.shape)), str(array.dtype), *numbers)
    for table in (streams, splits, arrays):
        console.print(table)
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    store = open_store(absolute(options.url))
    manifest = load_manifest(store)
    connect()
    with Display() as display:
        damage = verify(store, manifest, Workers(), display.counter("verify", "shards"))
    table = Table("split", *(Column(name, justify="right") for name in ("shards", "clips", "GB", "damaged files")))
    for name, part in manifest.splits.items():
        damaged = len({each.file for each in damage if each.split == name})
        table.add_row(name, f"{len(part.shards):,}", f"{sum(part.shards.clips):,}", f"{sum(part.shards.bytes) / 1e9:.3f}", str(damaged))
    console.print(table)
    for each in damage:
        console.print(f"{each.file}: {each.what}")
    if damage:
        console.print("restore these files from a copy, byte for byte; or delete the dataset and prepare it again")
    else:
        console.print(f"state {manifest.hash} of {store.url} is whole")
    return 1 if damage else 0


def _summarise(manifest: Manifest, added: dict[str, int], last: str, left: dict[str, int], url: str, console: Console) -> None:
    console.print(f"dataset {url}, state {manifest.hash}")
    table = Table()
    for column in ("split", "clips", "added", "shards", "MB", last):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, part in manifest.splits.items():
        numbers = (sum(part.shards.clips), added[split], len(part.shards))
        table.add_row(split, *map(str, numbers), f"{sum(part.shards.bytes) / 1e6:.1f}", str(left[split]))
    console.print(table)


def _list_refused(clips: Sequence[tuple[str, str, str]], console: Console) -> None:
    console.print("clips that cannot be used:")
    table = Table()
    table.add_column("split")
    table.add_column("reason", overflow="fold")
    for split, _, reason in clips:
        table.add_row(split, reason)
    console.print(table)


def _names(text: str) -> list[str]:
    return text.split(",")


def _clips(text: str) -> dict[str, int]:
    try:
        return {split: int(count) for split, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be like train=400,val=60,test=60") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
