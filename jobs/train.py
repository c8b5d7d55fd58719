"""Train a run: autoencoder -> latents -> diffusion -> evaluation. Without --config it makes and runs the demo.

The same command resumes: kill it at any time and type it again. A finished run says so and ends.
"""

import argparse
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from cluster import cli
from cluster.config.loading import help_text, load
from cluster.config.paths import anchored
from cluster.config.schema import Data, Experiment, Run
from cluster.data.demo import DYADS, make_demo
from cluster.data.manifest import NoDataset
from cluster.driver.pin import pin
from cluster.driver.plan import plan, plan_without_data
from cluster.driver.run import STEPS, check_run, execute
from cluster.evaluation.picture import keep_picture
from cluster.evaluation.report import write_report
from cluster.evaluation.rows import MODEL, RANDOM, WRONG, chunk_of
from cluster.evaluation.validation import SPLIT
from cluster.runs.saved import SavedRun
from cluster.storage import StorageError
from cluster.telemetry.display import Display
from reactdiff.data.sample import AUTHORS, AUTHORS_FRAMES, SIMULATED
from reactdiff.data.synthetic.oracles import frontier_names, oracle_name
from reactdiff.metrics.frontier import frontier_share
from reactdiff.metrics.official import Scores
from reactdiff.metrics.report import gap_closed, print_table
from reactdiff.stage import Source

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def main() -> int:
    """Parse the command line and bring the run to its end."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of an experiment, each settable in YAML or as KEY=VALUE:\n" + help_text(),
    )
    parser.add_argument("--config", type=Path, help="YAML file of the experiment; default: the demo, whose data are made first")
    parser.add_argument("--stage", choices=("all", *STEPS), default="all", help="one stage only; default: all, in this order")
    parser.add_argument("--dry-run", action="store_true", help="check configuration and data, print what would run, start nothing")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for another driver of the same run that is still at work")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change one key, for example optim.lr=1e-4")
    arguments = parser.parse_intermixed_args()
    config = arguments.config or DEMO
    experiment = anchored(load(config, arguments.overrides))
    steps = STEPS if arguments.stage == "all" else (arguments.stage,)
    if arguments.dry_run:
        _dry_run(experiment, config.stem, steps, demo=arguments.config is None)
        return 0
    with Display() as display:
        if arguments.config is None:
            make_demo(experiment.data.url, display, one_to_many=experiment.diffusion.other_target > 0)
        scores = execute(experiment, pin(experiment, config.stem), steps, display, wait=not arguments.no_wait)
    if scores:
        print_table(scores)
        if oracle_name() in scores:
            corr = {row: score.official["FRCorr"] for row, score in scores.items()}
            try:
                closed = {row: gap_closed(corr[row], corr[RANDOM], corr[oracle_name()]) for row in (MODEL, WRONG)}
                print(f"FRCorr, from random listener (0 %) to oracle (100 %): model {closed[MODEL]:.0%}, {WRONG} {closed[WRONG]:.0%}")
            except ValueError as error:  # a few clips, say: the run is done all the same
                print(f"FRCorr of random listener and oracle cannot be compared: {error}")
            _say_share(scores, frontier_names(chunk_of(experiment.model)))
        words = ["--config", str(config)] if arguments.config else []
        _say_what_next(pin(experiment, config.stem).saved(experiment), [*words, *arguments.overrides])
    return 0


def _say_share(scores: Mapping[str, Scores], frontier: Sequence[str]) -> None:
    """How much of what can be known the model knows, at the variety that it shows."""
    own, *points = ((scores[row].official["FRCorr"], scores[row].official["FRDiv"]) for row in (MODEL, *frontier))
    if not math.isnan(share := frontier_share(*own, points)):
        print(f"FRCorr, of what {frontier[0]} and means of its draws reach at the model's FRDiv: {share:.0%}")


def _dry_run(experiment: Experiment, config_name: str, steps: Sequence[str], demo: bool) -> None:
    """Print the plan; where there are no data yet, as much of it as does not depend on them."""
    try:
        pinned = pin(experiment, config_name)
    except NoDataset as missing:
        clips = Source(SIMULATED, DYADS.frames) if demo else Source(AUTHORS, AUTHORS_FRAMES)
        features = ", ".join(f"{stream.name} {stream.width}" for stream in clips.streams) + f"; {clips.frames} frames a clip"
        if demo:
            print(f"there is no dataset at {experiment.data.url} yet; without --dry-run this command simulates it ({features})")
        else:
            print(f"{missing}\nassumption until then: the widths of the authors' features ({features}); steps depend on the data")
        Console().print(plan_without_data(experiment, clips))
        return
    for origin in check_run(experiment, pinned, steps):
        print(origin)
    Console().print(plan(experiment, pinned))


def _say_what_next(run: SavedRun, words: Sequence[str]) -> None:
    """Say what an evaluated run has left, and commands that go on from here, as they can be pasted.

    Args:
        run: what was evaluated.
        words: of this command, but `--stage`.
    """
    url, data, store = run.store.url, run.experiment.data.url, run.experiment.run.store
    name, jobs = run.experiment.run.name, Path(sys.argv[0]).parent
    print(f"\nrun {name} is in {url}")
    picture = None
    try:
        picture = keep_picture(run)
        print(f"its reactions to clip {picture.clip} of split {picture.split}, beside the real one: {picture.url}")
    except (ValueError, StorageError) as error:  # the run is done all the same
        print(f"no picture of its reactions: {error}")
    print(f"a page about it: {write_report(run.store)}")
    print("\nWhat to type next:")
    programs = Path(sys.prefix, "bin")
    if Path(shutil.which("python") or "").parent != programs and (programs / "activate").exists():
        _say("first", ".", programs / "activate")
    _say("its curves", "tensorboard", "--logdir", f"{url}/tensorboard")
    # The short names are looked up below the current folder; in a Ray job, which has a folder of its own, nothing is there.
    here = store == os.path.abspath(Run().store)
    if picture:
        found = ["--clip", picture.clip, "--split", picture.split]
        _say("reactions to a clip: arrays, tables, a picture", "python", jobs / "generate.py", name if here else url, *found)
    where = [f"data.url={data}", f"run.store={store}"]
    words = [word for word in words if not word.startswith(("data.url=", "run.store="))]  # they may have been relative
    if (val := run.clips.splits.get(SPLIT)) and val.appropriateness:
        usual = here and data == os.path.abspath(Data().url)
        _say("a sweep: what it would try", "python", jobs / "tune.py", "--dry-run", *([] if usual else where))
    _say('this run on a Ray cluster; if there is one, without the first line (README.md, "A cluster")', "ray", "start", "--head")
    _say("", "ray", "job", "submit", "--working-dir", ".", "--", "python", jobs / "train.py", *words, *where)


def _say(what: str, *command: str | Path) -> None:
    if what:
        print(f"  {what}")
    print(f"    {shlex.join(map(str, command))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
