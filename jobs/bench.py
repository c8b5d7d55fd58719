"""Measure: each verb prints figures beside a named rival's, measured in the same run.

python jobs/bench.py train                                          the demo's widths
python jobs/bench.py train --config jobs/configs/react2024.yaml     the authors' widths
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster import command
from cluster.bench import alone, bench_training
from cluster.experiment import load
from reactdiff.config import STAGES
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import Source, stages_of

CONFIGS = Path(__file__).parent / "configs"
AUTHORS = Source(
    (
        StreamSpec("va", "facial", 64),
        StreamSpec("au", "facial", 25088),
        StreamSpec("fer", "facial", 1408),
        StreamSpec("mfcc", "acoustic", 26),
        StreamSpec("w2v", "acoustic", 1536),
    ),
    750,
)
"""The authors' feature streams."""

SIMULATED = Source(
    (
        StreamSpec("va", "facial", 8),
        StreamSpec("au", "facial", 64),
        StreamSpec("fer", "facial", 16),
        StreamSpec("mfcc", "acoustic", 26),
    ),
    200,
)
"""The demo's."""


def main() -> int:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="items/s and peak memory of both stages on one rank, against a plain PyTorch loop")
    train.add_argument("--config", type=Path, default=CONFIGS / "demo.yaml", help="YAML file of the experiment (default: the demo)")
    train.add_argument("--steps", type=int, default=10, help="measured steps of each stage (default: 10)")
    train.add_argument("--stage", choices=STAGES, action="append", help="only this stage")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change one key of the experiment, for example workers.zero=3")
    arguments = parser.parse_args()
    experiment = load(arguments.config, arguments.overrides)
    source = SIMULATED if "w2v" not in experiment.model.acoustic else AUTHORS
    alone()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {experiment.workers.threads} threads"
    table = Table(title=f"training on {device}, ZeRO-{experiment.workers.zero}, {experiment.optim.precision}", title_justify="left")
    for column in ("stage", "items/s", "plain PyTorch", "ratio", "MFU", "peak memory"):
        table.add_column(column, justify="right")
    for name in arguments.stage or stages_of(experiment.model):
        speed = bench_training(experiment, name, source, arguments.steps)
        mfu = f"{speed.mfu:.1%}" if speed.mfu else "-"
        ratio, memory = f"{speed.items_per_second / speed.plain:.2f}", f"{speed.peak_memory / 1e9:.2f} GB"
        table.add_row(name, f"{speed.items_per_second:.2f}", f"{speed.plain:.2f}", ratio, mfu, memory)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
