"""What every job shares: one sentence for an error, the exit code, numbers on the command line, and where relative folders lie."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.config import Experiment
from cluster.failures import StageFailed
from cluster.lives import Superseded
from cluster.storage import StorageError

INTERRUPTED = 130


def run(main: Callable[[], int]) -> int:
    """Run a job's main; an error that a person can mend becomes one paragraph on stderr and a non-zero exit code."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, StorageError, StageFailed, Superseded, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def home() -> Path:
    """The folder that relative folders are taken from.

    That is the current one, but in a Ray job the current one is a temporary copy of the project that Ray deletes: there it is
    `~/reactdiff`.
    """
    here = Path.cwd()
    return Path.home() / "reactdiff" if "runtime_resources" in here.parts else here


def absolute(url: str) -> str:
    """A URL as every process and machine understands it."""
    return url if "://" in url else os.path.abspath(home() / url)


def anchored(experiment: Experiment) -> Experiment:
    """The experiment with absolute folders and files; a run's mere name stays one."""
    data = experiment.data
    weights = tuple(absolute(where) if "/" in where or where.endswith(".pth") else where for where in experiment.model.init_from)
    return experiment.model_copy(
        update={
            "model": experiment.model.model_copy(update={"init_from": weights}),
            "data": data.model_copy(update={"url": absolute(data.url), "cache": data.cache and absolute(data.cache)}),
            "run": experiment.run.model_copy(update={"store": absolute(experiment.run.store)}),
            "telemetry": experiment.telemetry.model_copy(update={"targets": absolute(experiment.telemetry.targets)}),
        }
    )
