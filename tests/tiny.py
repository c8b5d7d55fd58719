"""The smallest real things: a simulated dataset in shards, an experiment on it, a finished run of it."""

import contextlib
import importlib
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster import cli
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


def call(verb: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What `job` does, in this process: it costs no start of a Python, nor of a Ray where this process has one."""
    command, said, errors = [f"jobs/{verb}.py", *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", command)
        warnings.simplefilter("ignore", DeprecationWarning)  # as for a user: those of Ray Train
        try:
            code = cli.run(importlib.import_module(f"jobs.{verb}").main)
        except SystemExit as error:  # of argparse
            code = int(error.code or 0)
    assert code == 0 or not check, f"{' '.join(command)} ended with {code}:\n{said.getvalue()}\n{errors.getvalue()}"
    return subprocess.CompletedProcess(command, code, said.getvalue(), errors.getvalue())


def make_shards(folder: Path, *clips: str, per_shard: int = 6, frames: int = FRAMES) -> Path:
    """A dataset in `folder`/shards with so many clips, such as train=8, through jobs/prepare.py; made again, it grows."""
    call("prepare", "simulate", folder / "tree", "--clips", ",".join(clips), "--frames", str(frames))
    call("prepare", "react2024", folder / "tree", folder / "shards", "--clips-per-shard", str(per_shard))
    return folder / "shards"


def tiny(shards: Path | str, store: Path | str, *overrides: str) -> Experiment:
    """A small experiment on these shards."""
    return load(None, [*settings(shards, store), *overrides])


def settings(shards: Path | str, store: Path | str) -> list[str]:
    """The overrides that make it."""
    return [*OVERRIDES, f"data.url={shards}", f"run.store={store}", f"telemetry.targets={Path(str(shards)).parent / 'targets'}"]
