"""Measure: each verb prints figures beside a named rival's, measured in the same run.

python jobs/bench.py train                                          the demo's widths
python jobs/bench.py train --config jobs/configs/react2024.yaml     the authors' widths
python jobs/bench.py train --rival --config jobs/configs/react2024.yaml optim.batch=2 workers.threads=2     against the published way
python jobs/bench.py generate --config jobs/configs/react2024.yaml workers.threads=2            ten reactions, against the published way
python jobs/bench.py gpu                                            what only a GPU shows, in ten minutes; needs no Ray
python jobs/bench.py online                                         a listener that reacts while the speaker speaks
python jobs/bench.py data                                           our loader over S3, against the wire and webdataset
python jobs/bench.py checkpoint                                     how long one holds up a step, against a plain copy
python jobs/bench.py recovery                                       from the kill of a rank to the next step, against stock Ray Train
python jobs/bench.py startup                                        to the first step, from the last, against stock Ray Train
python jobs/bench.py metrics                                        a pair of reactions, against the challenges' way
python jobs/bench.py metrics --full                                 and as many as the test set has, on all cores
python jobs/bench.py sweep                                          halving, against the full grid: two hours, and it resumes
python jobs/bench.py lags offline=NAME online=NAME                  which moments of the speaker runs react to
python jobs/bench.py oracles                                        what can be known of the demo's test clips: minutes
python jobs/bench.py science                                        the table of docs/science.md: hours on two cores, and it resumes
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from cluster import cli
from cluster.config.loading import load
from cluster.config.paths import absolute, anchored
from cluster.config.schema import Experiment
from cluster.runtime.device import best_device
from cluster.studies.marked_page import assert_marked, put_between
from cluster.telemetry.display import Display
from reactdiff.clip import FRAME_RATE
from reactdiff.config import STAGES
from reactdiff.data import sample
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import LATENT, AutoencoderStage, DiffusionStage, Source, Stage, stages_of

CONFIGS = Path(__file__).parent / "configs"
SERVER = Path(__file__).parent.parent / "infra" / "objectstore.py"
RANKS = 1000
"""Of the run whose scrape is measured."""

MARK, PAIRS_MARK, ORACLES_MARK = "<!-- table -->", "<!-- pairs -->", "<!-- oracles -->"
SCORES = Path(__file__).parent.parent / "docs" / "science"
AUTHORS = Source(sample.AUTHORS, sample.AUTHORS_FRAMES)
SIMULATED = Source(sample.SIMULATED, 200)
"""What the demo's dataset holds."""


def main() -> int:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = _verb(
        verbs, "train", train, CONFIGS / "demo.yaml", "items/s and peak memory of both stages on one rank, against a plain PyTorch loop"
    )
    verb.add_argument("--steps", type=cli.positive, default=10, help="measured steps of each stage (default: 10)")
    verb.add_argument("--stage", choices=STAGES, action="append", help="only this stage")
    verb.add_argument("--rival", action="store_true", help="on the CPU, against the published code's way, each in a process of its own")
    verb.add_argument("--rounds", type=cli.positive, default=3, help="of --rival, in turns (default: 3)")
    verb = _verb(verbs, "generate", generate, CONFIGS / "demo.yaml", "reactions to a clip on the CPU, against the published code's way")
    verb.add_argument("--rounds", type=cli.positive, default=3, help="in turns (default: 3)")
    what = "what only a GPU shows, part by part: parity, speed and memory at each ZeRO stage, a checkpoint, reactions, a profile"
    verb = _verb(verbs, "gpu", gpu, CONFIGS / "react2024.yaml", what)
    verb.add_argument("--only", metavar="PARTS", help="names with commas; default: all")
    verb.add_argument("--steps", type=cli.positive, default=10, help="measured steps of each kind (default: 10)")
    verb.add_argument("--out", type=Path, default=Path("work/bench-gpu"), help="folder of card.json and card.md (default: work/bench-gpu)")
    verb = _verb(verbs, "online", online, CONFIGS / "online.yaml", "reacting window by window, against the speaker's real time")
    verb.add_argument("--seconds", type=cli.positive, default=30, help="length of the clip (default: 30)")
    verb.add_argument("--count", type=cli.positive, default=10, metavar="K", help="reactions at the same time (default: 10)")
    verb = _verb(
        verbs, "data", data, CONFIGS / "demo.yaml", "reading from S3: verified batches, against raw boto3 and stock webdataset, same bytes"
    )
    verb.add_argument("--url", metavar="s3://BUCKET/PREFIX", help="where the data is made (default: a server of our own, in work/bench)")
    verb.add_argument("--size", type=cli.positive, default=2000, metavar="MB", help="of each dataset (default: 2000)")
    verb.add_argument("--rounds", type=cli.positive, default=5, help="measurements of each reader, in turns (default: 5)")
    verb.add_argument("--stage", choices=STAGES, action="append", help="only what this stage reads")
    verb = _verb(
        verbs, "science", science, CONFIGS / "science.yaml", "models, ablations and peers on equal data, against baselines and oracles"
    )
    verb.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between the <!-- table --> marks of this file")
    what = "and how far every model is from this row, clip by clip; between the <!-- pairs --> marks of that file"
    verb.add_argument("--against", action="append", default=[], metavar="ROW", help=what)
    verb.add_argument("--picture", type=Path, metavar="FILE.png", help="draw agreement against variety, oracles as curves")
    what = "where scores are kept, by clip; a run that has them there is not trained, and --write puts all there (default: docs/science)"
    verb.add_argument("--scores", type=Path, default=SCORES, metavar="FOLDER", help=what)
    what = "12 trials with halving, against all of them to their end: items, time, and whether both name the same trial"
    verb = _verb(verbs, "sweep", sweep, CONFIGS / "bench-sweep.yaml", what)
    verb.add_argument("--seeds", type=cli.positive, default=2, help="of the trials, each a sweep of its own (default: 2)")
    verb.add_argument("--resamples", type=cli.positive, default=10, help="of val's clips (default: 10)")
    what = "folder of the runs, which are kept, and taken up again (default: work/bench-sweep)"
    verb.add_argument("--work", type=Path, default=Path("work/bench-sweep"), metavar="FOLDER", help=what)
    what = "which moments of the speaker finished runs react to, by how long ago they were: a table and a picture"
    verb = verbs.add_parser("lags", help=what, description=what)
    verb.add_argument("runs", nargs="+", metavar="NAME=RUN", help="what the line is called, and the run: its name, folder or URL")
    verb.add_argument("--clips", type=cli.positive, default=20, metavar="N", help="of the split it is scored on (default: 20)")
    cli.add_store(verb)
    verb.add_argument("--out", type=Path, default=Path("work/lags.png"), metavar="FILE.png", help="picture (default: work/lags.png)")
    verb.set_defaults(function=lags)
    what = "what can be known of the demo's test clips: every oracle, without training, in minutes"
    verb = verbs.add_parser("oracles", help=what, description=what)
    verb.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between the <!-- oracles --> marks of this file")
    verb.set_defaults(function=oracles)
    what = "how long a checkpoint holds up a step, against a plain copy of the same tensors, with a store that is slow"
    verb = verbs.add_parser("checkpoint", help=what, description=what)
    verb.add_argument("--size", type=cli.positive, default=200, metavar="MB", help="of the rank's part of the state (default: 200)")
    verb.add_argument("--rounds", type=cli.positive, default=7, help="checkpoints after the first (default: 7)")
    verb.set_defaults(function=checkpoint)
    what = "from the kill of a rank to the end of the next step, against an empty loop under stock Ray Train"
    verb = _verb(verbs, "recovery", recovery, CONFIGS / "demo.yaml", what)
    verb.add_argument("--kills", type=cli.positive, default=10, help="of each (default: 10)")
    what = "from the command to its first step, and from its last step to its end, against an empty loop under stock Ray Train"
    verb = _verb(verbs, "startup", startup, CONFIGS / "demo.yaml", what)
    verb.add_argument("--rounds", type=cli.positive, default=3, help="of each, in turns (default: 3)")
    verb = verbs.add_parser("metrics", help="CPU time of the official metrics, against the challenges' way, on the same arrays")
    verb.add_argument("--full", action="store_true", help="also score a set of the size of the test set on all cores: minutes")
    verb.set_defaults(function=metrics)
    arguments = parser.parse_args()
    return arguments.function(arguments)


def _verb(verbs: Any, name: str, function: Callable[[argparse.Namespace], int], config: Path, what: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=what, description=what)
    parser.add_argument("--config", type=Path, default=config, help=f"YAML file (default: {config.name})")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change one key of the experiment, for example workers.zero=3")
    parser.set_defaults(function=function)
    return parser


def train(arguments: argparse.Namespace) -> int:
    """Training speed on one rank."""
    from cluster.bench.rival import Rivalry
    from cluster.bench.scrape import scrape_seconds
    from cluster.bench.tables import training_table
    from cluster.bench.training import alone, bench_training
    from cluster.training.settings import engine_settings

    experiment = load(arguments.config, arguments.overrides)
    source = _source(experiment)
    stages = arguments.stage or stages_of(experiment.model)
    if arguments.rival:
        for name in stages:
            _against_the_published(Rivalry(experiment, source, name, arguments.steps), arguments.rounds)
        return 0
    device = best_device()
    alone(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {experiment.workers.threads} threads"
    speeds = {name: bench_training(experiment, name, source, arguments.steps) for name in stages}
    title = f"training on {where}, ZeRO-{engine_settings(experiment, stages[0], ranks=1).zero}, {experiment.optim.precision}"
    Console().print(training_table(title, speeds))
    print(f"a scrape with {RANKS} ranks: {1000 * scrape_seconds(RANKS):.0f} ms of CPU (100 at most)")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Speed of generating a clip's reactions."""
    from cluster.bench.rival import Rivalry

    experiment = load(arguments.config, arguments.overrides)
    _against_the_published(Rivalry(experiment, _source(experiment), "generation", 1), arguments.rounds)
    return 0


def _source(experiment: Experiment) -> Source:
    """What a dataset of clips for this model would hold."""
    return SIMULATED if "w2v" not in experiment.model.acoustic else AUTHORS


def _against_the_published(rivalry: Any, rounds: int) -> None:
    from cluster.bench.rival import in_turns
    from cluster.bench.tables import rivalry_table

    experiment, stage = rivalry.experiment, rivalry.stage
    with Display() as display:
        found = in_turns(rivalry, rounds, display.counter(stage, "measurements"))
    if stage in STAGES:
        what = f"a step of stage {stage}, batch {experiment.optim.batch[stage]}, {experiment.optim.precision}"
    else:
        what = f"{experiment.evaluation.predictions} reactions to a clip, {experiment.diffusion.sampling_steps} sampling steps (scaled)"
    Console().print(rivalry_table(f"{what}; {experiment.workers.threads} threads, medians of {rounds} rounds", found))


def gpu(arguments: argparse.Namespace) -> int:
    """What only a GPU shows."""
    from cluster.bench.card import Card
    from cluster.bench.card_page import measure_card, page
    from cluster.bench.card_parts import PARTS, plan_engines
    from cluster.bench.training import alone

    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"--only names {', '.join(sorted(unknown))}, but the parts are {', '.join(PARTS)}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product on a GPU
    experiment = load(arguments.config, arguments.overrides)
    device = best_device()
    card = Card(experiment, _source(experiment), device, arguments.steps)
    if "engines" in parts:
        card = replace(card, planned=plan_engines(card))
    alone(device)
    with Display() as display:
        found = measure_card(card, parts, arguments.out, display.counter("gpu", "parts"))
    Console(markup=False, soft_wrap=True).print(page(found))
    print(f"{arguments.out}/card.json and card.md have all of it")
    return 0


def online(arguments: argparse.Namespace) -> int:
    """Speed of an online listener."""
    from cluster.bench.tables import online_table
    from cluster.bench.training import bench_online

    experiment = load(arguments.config, arguments.overrides)
    chunk = experiment.model.chunk
    spent = bench_online(experiment, SIMULATED, -(-arguments.seconds * FRAME_RATE // chunk), arguments.count)
    Console().print(online_table(spent, chunk / FRAME_RATE, arguments.count))
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Reading speed of one rank."""
    from cluster.bench.loading import Task, Undrawn, bench_data, server
    from cluster.bench.noise_dataset import make_noise
    from cluster.bench.tables import loading_table

    if not arguments.url:
        again = [sys.executable, __file__, *sys.argv[1:], "--url", "s3://bench/data"]
        return subprocess.call([sys.executable, str(SERVER), "work/bench", "--bucket", "bench", "--", *again])
    experiment = load(arguments.config, arguments.overrides)
    authors = load(CONFIGS / "react2024.yaml", []).model
    encoded = Source([StreamSpec(LATENT, "latent", experiment.model.latent)], SIMULATED.frames)
    reading: dict[str, Stage] = {
        "autoencoder": AutoencoderStage(authors, AUTHORS),
        "diffusion": DiffusionStage(experiment.model, experiment.diffusion, encoded),
    }
    settings = experiment.data
    for name in arguments.stage or STAGES:
        source, what = reading[name].source, "latents" if name == "diffusion" else "person-clips"
        with Display() as display:
            url = make_noise(arguments.url, source, arguments.size * 10**6, display.counter(f"making {what}", "clips"))
            task = Task(
                url=url,
                stage=Undrawn(reading[name]),
                batch=experiment.optim.batch[name],
                block=settings.block,
                group=settings.group,
                read_ahead=int(1e6 * settings.read_ahead),
                readers=settings.readers,
            )
            found = bench_data(task, arguments.rounds, display.counter(f"reading {what}", "measurements"))
        width, cores = sum(spec.width for spec in source.streams), len(os.sched_getaffinity(0))
        title = (
            f"{what} of {source.frames} frames x {width}, batches of {task.batch}, read ahead {settings.read_ahead:g} MB, "
            f"from {server(url)}, {task.readers} threads, {cores} cores, medians of {arguments.rounds} rounds"
        )
        Console().print(loading_table(title, found))
    return 0


def checkpoint(arguments: argparse.Namespace) -> int:
    """What a step waits for."""
    from cluster.bench.checkpoint import REQUEST_SECONDS, bench_checkpoint
    from cluster.bench.tables import checkpoint_table

    with Display() as display:
        found = bench_checkpoint(arguments.size * 10**6, arguments.rounds, display.counter("checkpoints", "checkpoints"))
    title = (
        f"a step held up by a checkpoint of {arguments.size} MB on one thread, {arguments.rounds} rounds, "
        f"{1e3 * REQUEST_SECONDS:.0f} ms for each of {found.requests} requests"
    )
    Console().print(checkpoint_table(title, found))
    return 0


def recovery(arguments: argparse.Namespace) -> int:
    """Time without training after a rank was killed."""
    from cluster.bench.recovery import our_recoveries, stock_recoveries
    from cluster.bench.tables import seconds_table
    from cluster.data.demo import make_demo

    os.environ["RAY_ADDRESS"] = "local"  # what is killed here is nobody else's
    first, later = arguments.kills // 2, arguments.kills - arguments.kills // 2
    with TemporaryDirectory() as folder, Display() as display:
        settings = ("run.name=recovery", f"run.store={folder}", f"run.checkpoint_every={20 * 4}", "run.log_every=1", "optim.epochs=1000")
        experiment = anchored(load(arguments.config, [*settings, *arguments.overrides]))
        make_demo(experiment.data.url, display)
        before = stock_recoveries(experiment, first, Path(folder) / "before") if first else []
        found = our_recoveries(experiment, arguments.kills, display)
        rival = before + stock_recoveries(experiment, later, Path(folder) / "after")  # on both sides: machines grow busier
    ranks = experiment.workers.least
    title = f"from the SIGKILL of one of {ranks} ranks to the end of the next step, {arguments.kills} kills of each"
    Console().print(seconds_table(title, {"a run": found, "an empty loop, stock Ray Train": rival}))
    return 0


def startup(arguments: argparse.Namespace) -> int:
    """Time at both ends of a command."""
    from cluster.bench.startup import startups
    from cluster.bench.tables import startup_tables
    from cluster.data.demo import make_demo

    with TemporaryDirectory() as folder, Display() as display:
        experiment = anchored(load(arguments.config, arguments.overrides))
        make_demo(experiment.data.url, display)
        words = ["--config", str(arguments.config), *arguments.overrides]
        progress = display.counter("startup", "commands")
        found = startups(words, experiment.workers.least, Path(folder), arguments.rounds, progress)
    for table in startup_tables(arguments.rounds, found):
        Console().print(table)
    return 0


def metrics(arguments: argparse.Namespace) -> int:
    """Cost of the official metrics."""
    from cluster.bench.metrics import full_size, pair_costs, set_cost
    from cluster.bench.tables import full_size_table, pairs_table, set_table

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with Display() as display:
        costs = pair_costs(display.counter("pairs", "measurements"))
        whole = set_cost(display.counter("a set", "metrics"))
        full = full_size(cores, display.counter("full size", "clips")) if arguments.full else None
    Console().print(pairs_table(costs))
    Console().print(set_table(whole))
    if full:
        Console().print(full_size_table(full, cores))
    return 0


def science(arguments: argparse.Namespace) -> int:
    """What models reach."""
    from cluster.data.demo import DYADS, make_demo
    from cluster.storage import open_store
    from cluster.studies.comparison import Comparison, compare, comparison_runs, scored_groups
    from cluster.studies.comparison_pairs import pairs_markdown
    from cluster.studies.comparison_report import frontier_figure, write_comparison_report
    from cluster.studies.comparison_table import markdown

    comparison = Comparison.read(arguments.config)
    if missing := [name for name in arguments.against if name not in comparison.rows]:
        raise ValueError(f"--against {missing[0]!r} is no row of {arguments.config}; they are {', '.join(comparison.rows)}")
    if arguments.write:
        assert_marked(arguments.write, MARK)
        if arguments.against:
            assert_marked(arguments.write, PAIRS_MARK)
    kept = arguments.scores / f"{comparison.name}.json"
    experiment = anchored(comparison.load(arguments.overrides))
    with Display() as display:
        every = [run.experiment for run in comparison_runs(comparison, arguments.overrides)]
        others = {one.data.url for one in every if one.diffusion.other_target}
        few = {absolute(url): train for url, train in comparison.dyads.items()}
        for url in dict.fromkeys(one.data.url for one in every):
            make_demo(url, display, one_to_many=url in others, train=few.get(url, DYADS.clips["train"]))
        rows = compare(comparison, arguments.overrides, display, kept, keep=arguments.write is not None)
    _say_table(markdown(rows), arguments.write, MARK)
    if arguments.against:
        pairs = pairs_markdown(rows, arguments.against, scored_groups(every[0], rows))
        _say_table(pairs, arguments.write, PAIRS_MARK)
    if arguments.picture:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        frontier_figure(rows).savefig(arguments.picture, dpi=130)
    print(f"as a page: {write_comparison_report(open_store(experiment.run.store), comparison.name, rows)}")
    return 0


def lags(arguments: argparse.Namespace) -> int:
    """When reactions change after a moment of the speaker was replaced."""
    from cluster.runs.saved import open_run
    from cluster.studies.lags import lag_profile
    from reactdiff.data.synthetic.dyad import LONGEST_DELAY, SHORTEST_DELAY, USUAL_DELAY
    from reactdiff.influence import PIECE
    from reactdiff.plot import lags_png

    found = {}
    with Display() as display:
        for named in arguments.runs:
            name, equals, run = named.partition("=")
            if not equals:
                raise ValueError(f"{named!r} should be NAME=RUN, for example offline=demo-1a2b3c4d")
            found[name] = lag_profile(open_run(run, arguments.store), arguments.clips, display.counter(name, "clips"))
    table = Table("run", *(Column(f"{PIECE * lag / FRAME_RATE:.1f} s", justify="right") for lag in range(-1, 11)))
    for name, profile in found.items():
        now = len(profile) // 2
        table.add_row(name, *(f"{value / profile.max():.2f}" for value in profile[now - 1 : now + 11]))
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(lags_png(found, PIECE, (SHORTEST_DELAY, USUAL_DELAY, LONGEST_DELAY)))
    print(f"as a picture: {arguments.out}")
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """What halving saves, and what it finds."""
    from cluster.bench.sweeping import bench_halving
    from cluster.bench.tables import halving_table
    from cluster.data.demo import make_demo
    from cluster.studies.sweep import Sweep
    from cluster.studies.sweep_table import LiveSweep

    asked, found = Sweep.read(arguments.config), {}
    if asked.halving is None or asked.search != "grid":
        raise ValueError(f"{arguments.config} is no grid with halving, to be run with it and without: see {CONFIGS / 'bench-sweep.yaml'}")
    with Display() as display:
        make_demo(anchored(asked.load(arguments.overrides)).data.url, display)
    for seed in range(arguments.seeds):
        overrides, folder = [*arguments.overrides, f"seed={seed}"], f"{arguments.work.resolve()}/{seed}"
        with LiveSweep() as live:
            found[seed] = bench_halving(asked, overrides, folder, arguments.resamples, live.say, live.show)
    title = f"{asked.most} trials to their end, and with halving at {list(asked.halving.rungs)} items, by {asked.first_metric} on val"
    Console().print(halving_table(title, found))
    return 0


def oracles(arguments: argparse.Namespace) -> int:
    """What can be known."""
    from cluster.bench.oracles import BESIDE, score_oracles
    from cluster.config.schema import Evaluation
    from cluster.data.demo import DYADS
    from cluster.studies.comparison_table import markdown

    if arguments.write:
        assert_marked(arguments.write, ORACLES_MARK)
    with Display() as display:
        rows = score_oracles(DYADS, "test", Evaluation().predictions, BESIDE, display.counter("oracles", "items"))
    _say_table(markdown(rows), arguments.write, ORACLES_MARK)
    return 0


def _say_table(table: str, page: Path | None, mark: str) -> None:
    print(table)
    if page:
        put_between(page, mark, table)


if __name__ == "__main__":
    sys.exit(cli.run(main))
