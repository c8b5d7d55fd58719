"""Where relative paths lie: below the current folder, and for a Ray job below a folder that outlives it."""

import os
from pathlib import Path

from cluster.config.schema import Experiment


def base_folder() -> Path:
    """The folder that relative folders are taken from.

    That is the current one, but in a Ray job the current one is a temporary copy of the project that Ray deletes: there it is
    `~/reactdiff`.
    """
    here = Path.cwd()
    return Path.home() / "reactdiff" if "runtime_resources" in here.parts else here


def absolute(url: str) -> str:
    """A URL as every process and machine understands it."""
    return url if "://" in url else os.path.abspath(base_folder() / url)


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
