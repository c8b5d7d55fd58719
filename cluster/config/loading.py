"""From YAML and dotted overrides to a checked experiment, and from an experiment to YAML and `--help`."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.schema import Experiment
from reactdiff.config import STAGES, Branch, PerStage


class ConfigError(ValueError):
    """A configuration that cannot be used: names the source, the key, the value and the rule."""


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment: defaults, then the YAML file, then `key=value` overrides with dotted keys.

    Raises:
        ConfigError: for an unreadable file, an unknown key (with the nearest name) or a value that breaks a rule.
    """
    return laid_over({}, "overrides", overrides) if path is None else laid_over(read_yaml(path), str(path), overrides)


def laid_over(given: dict[str, Any], source: str, overrides: Sequence[str]) -> Experiment:
    """An experiment: defaults, then the tree of a configuration file, then overrides; `source` names the file in errors.

    Raises:
        ConfigError: as `load`.
    """
    tree: dict[str, Any] = {}
    _merge(tree, given, source)
    return _overridden(tree, overrides, source)


def changed(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """An experiment with `key=value` overrides laid over it.

    Raises:
        ConfigError: as `load`.
    """
    return _overridden(json.loads(experiment.model_dump_json()), overrides, "overrides")


def _overridden(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"{text!r} is no override; write key=value, for example optim.lr=1e-4 (--help lists the keys)")
        _merge(tree, _nested(key.split("."), _scalar(text, value)), f"override {text!r}")
    return build(tree, source)


def build(tree: dict[str, Any], source: str) -> Experiment:
    """The experiment of a nested mapping; `source` names it in errors."""
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f"{source}: {key} = {first['input']!r}" if key and first["type"] != "value_error" else source
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')} (--help explains every key)") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a configuration file holds.

    Raises:
        ConfigError: if there is no such file, or it holds anything else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; the ones of this project are in jobs/configs/") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, but a configuration is a mapping of branches (model:, optim:, ...)")
    return tree


def _scalar(override: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(
            f"{override!r} is no override: {text!r} is not valid YAML; a shell needs quotes around spaces, as in 'key={{a: 1}}'"
        ) from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value) if len(path) > 1 else value}


def _merge(tree: dict[str, Any], new: dict[str, Any], source: str, model: type[BaseModel] = Experiment, prefix: str = "") -> None:
    """Lay `new` over `tree`; a bare value for a per-stage field sets both stages."""
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if key not in model.model_fields:
            raise ConfigError(f"{source}: there is no key {dotted}{_nearest(key, prefix, model)}; --help lists all keys")
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, Branch):
            if not isinstance(value, dict) and issubclass(kind, PerStage):
                value = dict.fromkeys(STAGES, value)
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {dotted} is a branch with keys {', '.join(kind.model_fields)}, but was given {value!r}")
            if issubclass(kind, PerStage) and key not in tree:
                tree[key] = model.model_fields[key].get_default(call_default_factory=True)
                tree[key] = dict(tree[key])
            _merge(tree.setdefault(key, {}), value, source, kind, f"{dotted}.")
        else:
            tree[key] = value


def _nearest(key: str, prefix: str, model: type[BaseModel]) -> str:
    siblings = difflib.get_close_matches(key, list(model.model_fields), n=1)
    everywhere = [name for name, *_ in fields()]
    names = [f"{prefix}{sibling}" for sibling in siblings] or difflib.get_close_matches(f"{prefix}{key}", everywhere, n=1)
    return f"; did you mean {names[0]}?" if names else f"; {prefix.rstrip('.') or 'the tree'} has {', '.join(model.model_fields)}"


def _is_per_stage(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, PerStage)


def fields(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf of the tree as (dotted name, field information, annotation); a per-stage field is one leaf."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Branch) and not _is_per_stage(annotation):
            yield from fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info, annotation


def value_of(experiment: Experiment, dotted: str) -> Any:
    """The plain (JSON) value at a dotted name."""
    value: Any = experiment
    for part in dotted.split("."):
        value = getattr(value, part)
    return json.loads(value.model_dump_json()) if isinstance(value, BaseModel) else json.loads(json.dumps(value))


def to_yaml(experiment: Experiment) -> str:
    """The whole experiment, every default written out."""
    return yaml.safe_dump(json.loads(experiment.model_dump_json()), sort_keys=False)


def help_text() -> str:
    """One line for each key: name, default, unit, meaning, and how it may change."""
    lines = []
    for name, info, annotation in fields():
        extra = info.json_schema_extra
        default = info.get_default(call_default_factory=True)
        if _is_per_stage(annotation):
            default = dict(default)
        unit = f" [{extra['unit']}]" if extra["unit"] else ""
        lines.append(f"  {name} = {json.dumps(default)}{unit}\n      {info.description} ({extra['kind']})")
    return "\n".join(lines)
