"""The smallest real things: a simulated dataset in shards, an experiment on it, a finished run of it."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from cluster.config.loading import load
from cluster.config.schema import Experiment

ROOT = Path(__file__).parent.parent
FRAMES = 100

OVERRIDES = (
    "model.acoustic=[mfcc]",
    "model.hidden=32",
    "model.latent=16",
    "model.channels=32",
    "model.multipliers=[1,1]",
    "model.condition=64",
    "model.dropout=0",
    "diffusion.prediction=x0",
    "diffusion.sampling_steps=4",
    "optim.epochs=1",
    "optim.batch=6",
    "optim.lr=1e-4",
    "run.log_every=1",
    "evaluation.split=test",
    "evaluation.predictions=2",
    "evaluation.watch=0",
)


class Trained(NamedTuple):
    """A run's folder, and what the command that trained it said."""

    folder: Path
    stdout: str
    stderr: str


def job(verb: str, *arguments: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python jobs/<verb>.py ARGUMENTS` as a user would."""
    command = [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0 or not check, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


def make_shards(folder: Path) -> Path:
    """A dataset of 20 training and 8 test clips in `folder`/shards, through jobs/prepare.py."""
    job("prepare", "simulate", folder / "tree", "--clips", "train=20,test=8", "--frames", str(FRAMES))
    job("prepare", "react2024", folder / "tree", folder / "shards", "--clips-per-shard", "6")
    return folder / "shards"


def tiny(shards: Path | str, store: Path | str, *overrides: str) -> Experiment:
    """A small experiment on these shards."""
    return load(None, [*settings(shards, store), *overrides])


def settings(shards: Path | str, store: Path | str) -> list[str]:
    """The overrides that make it."""
    return [*OVERRIDES, f"data.url={shards}", f"run.store={store}", f"telemetry.targets={Path(str(shards)).parent / 'targets'}"]
