"""Files that build on an experiment, of a sweep or of retraining: a few keys of their own, and which experiment they mean."""

import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationError

from cluster.config.loading import ConfigError, laid_over, load, read_yaml
from cluster.config.schema import Experiment
from reactdiff.config import Branch
from reactdiff.metrics.official import EXTRA, OFFICIAL, REPAIRED

NAME = r"^[A-Za-z0-9._-]{1,60}$"


class Spec(Branch):
    """What such files share."""

    name: str = Field(pattern=NAME, description="Name of the sweep or model; names of runs begin with it.")
    experiment: str | dict[str, Any] = Field({}, description="YAML file of the experiment, relative to this file, or the tree itself.")
    overrides: dict[str, Any] = Field({}, description="Dotted keys of the experiment and their values, laid over it.")
    _file: tuple[dict[str, Any], str] = PrivateAttr(({}, ""))
    """Tree and name of the experiment's file. It is read once: what is under way does not change with the file, on no machine."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The spec in a file, with the file of its experiment.

        Raises:
            ConfigError: for an unreadable file, an unknown key (with the nearest name) or a value that breaks a rule.
        """
        tree = read_yaml(path)
        for key in tree:
            if key not in cls.model_fields:
                raise ConfigError(f"{path}: there is no key {key}{nearest(key, cls.model_fields)}")
        try:
            spec = cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            value = "" if first["type"] == "missing" else f" = {first['input']!r}"
            raise ConfigError(f"{path}: {key}{value}: {first['msg'].removeprefix('Value error, ')}") from None
        if isinstance(spec.experiment, str):
            file = path.parent / spec.experiment
            spec._file = read_yaml(file), str(file)
        return spec

    def load(self, *layers: Sequence[str]) -> Experiment:
        """The experiment: file or tree, then the overrides, then layers of `key=value`.

        Raises:
            ConfigError: as `cluster.config.loading.load`.
        """
        more = [*assignments(self.overrides), *(text for layer in layers for text in layer)]
        if isinstance(self.experiment, dict):
            return load(None, [*assignments(self.experiment), *more])
        return laid_over(*self._file, more)


def assignments(values: dict[str, Any]) -> list[str]:
    """The `key=value` texts of dotted keys and plain (JSON) values."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def nearest(name: str, names: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def known_metric(name: str) -> str:
    """The name itself, if it is a metric's.

    Raises:
        ValueError: if it is none, with the nearest one.
    """
    if name not in (known := OFFICIAL + REPAIRED + EXTRA):
        raise ValueError(f"there is no metric {name}{nearest(name, known)}")
    return name
