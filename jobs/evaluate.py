"""Score reactions as the REACT challenges do: those of a finished run beside its baselines, or any in an .npz file.

  python jobs/evaluate.py demo-1a2b3c4d                              a run by its name, below work/store
  python jobs/evaluate.py s3://bucket/store/runs/demo-1a2b3c4d       a run by its folder or URL
  python jobs/evaluate.py demo-1a2b3c4d --split val --clips 20 --predictions 3
  python jobs/evaluate.py demo-1a2b3c4d diffusion.sampler=dpm++ diffusion.sampling_steps=5
  python jobs/evaluate.py demo-1a2b3c4d --json > scores.json         nothing but JSON on stdout
  python jobs/evaluate.py --arrays reactions.npz --json              no run: pred (clips, K, frames, 25), target and
                                                                     speaker (clips, frames, 25), appropriate (clips, clips)

The newest weights of a run are scored on the split and the predictions its configuration names, unless you say otherwise. Parts
that are scored are kept: the same command again goes on after an interruption, and repeats a finished evaluation in seconds.
What the metrics mean, and how to read them: docs/metrics.md.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import cli
from cluster.config.schema import Experiment
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.plan import plan_evaluation
from cluster.runs.build_latents import build_latents
from cluster.runs.saved import SAMPLING, open_run
from cluster.runtime.ray_cluster import connect
from cluster.telemetry.display import Display
from reactdiff.metrics.arrays import load_arrays
from reactdiff.metrics.official import Scores, score
from reactdiff.metrics.report import print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, score, and print a table or JSON."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if (options.run is None) == (options.arrays is None):
        parser.error("name a run to score, or --arrays FILE.npz, one of the two")
    if options.arrays and (options.overrides or options.split or options.predictions or options.clips):
        parser.error("--split, --predictions, --clips and KEY=VALUE choose what of a run is scored; with --arrays all of the file is")
    with Display(sys.stderr if options.json or options.arrays else sys.stdout) as display:
        if options.arrays:
            cores = len(os.sched_getaffinity(0))
            scores = score(**load_arrays(options.arrays), threads=cores, progress=display.counter("score", "clips"))
            facts, rows = scores.to_dict(), {options.arrays.stem: scores}
        else:
            facts, rows = _score_run(options, display)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print_table(rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_run(parser, optional=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"draw with other diffusion.{', '.join(SAMPLING)}")
    parser.add_argument("--arrays", type=Path, metavar="FILE.npz", help="score the arrays of this file instead of a run")
    parser.add_argument("--split", help="split that is scored (default: the run's evaluation.split)")
    parser.add_argument(
        "--predictions", type=cli.positive, metavar="K", help="reactions to a speaker (default: evaluation.predictions)"
    )
    parser.add_argument("--clips", type=cli.positive, metavar="N", help="score the first N clips only (default: evaluation.clips)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout; progress goes to stderr")
    return parser


def _score_run(options: argparse.Namespace, display: Display) -> tuple[dict[str, Any], dict[str, Scores]]:
    """The scores of a run's newest exports, as facts for JSON and as rows of the table."""
    run = open_run(options.run, options.store).with_sampling(options.overrides)
    latents, diffusion = run.latents(), run.diffusion()
    asked = {name: getattr(options, name) for name in ("split", "predictions", "clips") if getattr(options, name)}
    evaluation = run.experiment.evaluation.model_copy(update=asked)
    there = connect(math.ceil(run.experiment.workers.cpus))
    # What was trained on GPUs may be scored on a machine that has none.
    workers = run.experiment.workers.model_copy(update={"gpu": run.experiment.workers.gpu and there.gpus > 0})
    experiment: Experiment = run.experiment.model_copy(update={"evaluation": evaluation, "workers": workers})
    build_latents(latents, workers, display.counter("latents", "shards"))
    scores = evaluate(experiment, run.store, latents, diffusion, display.counter("evaluation", "parts"))
    facts = {
        "run": run.store.url,
        "progress": (diffusion or latents.export).progress,
        **plan_evaluation(experiment, run.store, latents, diffusion).facts,
    }
    return facts | {"scores": {row: one.to_dict() for row, one in scores.items()}}, scores


if __name__ == "__main__":
    sys.exit(cli.run(main))
