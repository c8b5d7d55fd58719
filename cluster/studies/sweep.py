"""A sweep: what its file says, and the experiment of each of its trials. Every trial is a run like any other.

All trials use one state of the dataset, the current one at the sweep's first start, and are compared on `val`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from cluster.config.identity import digest, name_fields
from cluster.config.loading import ConfigError, build, to_yaml, value_of
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.config.spec import Spec, assignments, known_metric
from cluster.data.manifest import Manifest, load_manifest
from cluster.driver.pin import stage_end
from cluster.storage import AlreadyExists, NotFound, Store, open_store
from cluster.studies.first_stage import first_stage
from cluster.studies.halving import Halving
from cluster.studies.ledger import VERSION, Ledger
from cluster.studies.searchers import Method, Mode, Told, suggest
from cluster.studies.space import Dimension, Point, Space, text_of
from reactdiff.stage import stages_of

SPLIT = "val"
"""What trials are compared on: never what is reported in the end."""

QUESTION = ("evaluation.split", "evaluation.predictions", "evaluation.clips")
"""What a trial's scores depend on beside its weights."""

LAST = "diffusion"
"""The stage in which halving stops trials."""

ASKED_AT_RUNGS = ("model.space", "diffusion.history", "diffusion.normalisation")
"""Keys that decide what a trial is asked at a rung: what is mixed with noise and on which scale, and the past that it is told."""


class Sweep(Spec):
    """The keys of a sweep's file."""

    space: dict[str, Dimension] = Field(min_length=1, description="Dotted keys of the experiment: a list, or choice, range, log_range.")
    search: Method = Field("grid", description="grid: every point; random; optuna: what earlier trials suggest (TPE).")
    trials: int = Field(0, ge=0, description="Most trials; 0: all of a grid.")
    seed: int = Field(0, ge=0, description="Seed of the search, not of the trials.")
    metrics: dict[str, Mode] = Field({"FRCorr": "max"}, min_length=1, description="What is searched for; the first one chooses the best.")
    concurrent: int = Field(0, ge=0, description="Trials at the same time; 0: as many as there is room for.")
    halving: Halving | None = Field(None, description="When a trial ends before its end; nothing: never.")

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: dict[str, Mode]) -> dict[str, Mode]:
        for name in metrics:
            known_metric(name)
        return metrics

    @field_validator("space", mode="before")
    @classmethod
    def _lists(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        if empty := [key for key, values in space.items() if values == []]:
            raise ValueError(f"{empty[0]} has no value to try")
        return {key: {"choice": values} if isinstance(values, list) else values for key, values in space.items()}

    @model_validator(mode="after")
    def _possible(self) -> "Sweep":
        space = Space(self.space)
        if self.search == "grid":
            space.grid()
        elif not self.trials:
            raise ValueError(f"search: {self.search} goes on for ever: say how many trials")
        if self.search == "optuna" and not self.concurrent:
            raise ValueError(
                "search: optuna needs concurrent: what is proposed depends on how many trials are under way, so the file says it"
            )
        if self.halving and (asked := [key for key in ASKED_AT_RUNGS if key in self.space]):
            raise ValueError(
                f"halving compares errors of trials that are asked the same, but {' and '.join(asked)} in space would have them asked "
                "other things: another past, or noise of another strength. Leave halving out, or make a sweep for each value"
            )
        return self

    @property
    def first_metric(self) -> str:
        """The metric by which the best trial is chosen."""
        return next(iter(self.metrics))

    @property
    def most(self) -> int:
        """The largest number of trials."""
        points = len(Space(self.space).grid()) if self.search == "grid" else self.trials
        return min(points, self.trials or points)


@dataclass(frozen=True)
class Trial:
    """A point of the space, and its run.

    Attributes:
        number: of the trial.
        point: dotted keys and values.
        experiment: of its run, which is named by the sweep and by what it computes.
        first: of the run whose autoencoder it takes, None where it trains its own.
    """

    number: int
    point: Point
    experiment: Experiment
    first: Experiment | None

    @property
    def run(self) -> str:
        """Name of its run."""
        return self.experiment.run.name

    @property
    def text(self) -> str:
        """The point for people, and for Prometheus."""
        return text_of(self.point)

    @property
    def bracket(self) -> str:
        """Trials of one bracket are compared by halving: those of one seed share order, times and noise."""
        return str(self.experiment.seed)


class OpenSweep:
    """A sweep over one state of the dataset; opening it writes nothing.

    Attributes:
        sweep: what its file says.
        overrides: of the experiment, `key=value`.
        manifest: the state.
        home: the store of all runs.
        store: the sweep's folder in it.

    Raises:
        ConfigError: for a key or value that no experiment has, or a key that is set twice.
        ValueError: if the dataset cannot be read, or has no `val` split that can be scored.
    """

    def __init__(self, sweep: Sweep, overrides: Sequence[str]):
        if twice := {text.partition("=")[0] for text in overrides} & sweep.space.keys():
            raise ConfigError(f"{min(twice)} is in the space of sweep {sweep.name}; change it there, not as an override")
        self.sweep, self.overrides, self.space = sweep, tuple(overrides), Space(sweep.space)
        self._runs = dict[str, str]()
        for point in [*self.space.corners(), *self._early_points()]:
            sweep.load(self.overrides, assignments(point))  # a wrong key or value, before anything is looked up
        self.home = open_store(anchored(sweep.load(self.overrides)).run.store)
        self.store = self.home.at(f"sweeps/{sweep.name}")
        self.manifest = _manifest(sweep, self.overrides, self.store)

    def pin(self) -> None:
        """Note the state of the dataset, for every later start."""
        try:
            self.store.create("sweep.json", json.dumps({"manifest": self.manifest.hash}).encode())
        except AlreadyExists:
            pass

    def trial(self, number: int, point: Point) -> Trial:
        """The trial at a point.

        Raises:
            ConfigError: if no experiment is like that.
        """
        halving = self.sweep.halving
        rungs = [f"evaluation.rungs={list(halving.rungs)}", f"evaluation.rung_clips={halving.clips}"] if halving else []
        experiment = self._experiment(point, *self._asked, *rungs)
        experiment, first = self._shared(experiment)
        return Trial(number, point, experiment, first)

    def winner(self, point: Point) -> str:
        """The experiment of the best trial as a file for jobs/train.py, which scores it on the experiment's own split."""
        return to_yaml(self._shared(self._experiment(point))[0])

    def known_trials(self, ledger: Ledger) -> list[Trial]:
        """The trials that there are, and those that there will be as far as that can be said now: all but those Optuna proposes.

        Raises:
            ConfigError: if two of them are one run.
        """
        points = [ledger.trials[number].point for number in sorted(ledger.trials)]
        while self.sweep.search != "optuna" and len(points) < self.sweep.most:
            if (point := self.suggest(len(points), [], points)) is None:
                break
            points.append(point)
        found: dict[str, Trial] = {}
        for number, point in enumerate(points):
            trial = self.trial(number, point)
            if (twin := found.setdefault(trial.run, trial)) is not trial:
                raise ConfigError(
                    f"sweep {self.sweep.name}: {twin.text} and {trial.text} would be the same run, because they compute the same; "
                    "a space is made of different values of keys that --help of jobs/train.py calls identity"
                )
        return list(found.values())

    def suggest(self, number: int, told: Sequence[Told], taken: Sequence[Point]) -> Point | None:
        """The point of a trial, as `cluster.studies.searchers.suggest`: of no experiment is none, and of none that is a run already.

        Args:
            number: of the trial.
            told: of the trials that the searcher may know, from number 0 on.
            taken: points of all lower-numbered trials.
        """
        sweep = self.sweep

        def fits(point: Point) -> bool:
            try:
                return self._run_of(point) not in map(self._run_of, taken)
            except ConfigError:
                return False

        return suggest(sweep.search, self.space, list(sweep.metrics.values()), sweep.seed, number, told, fits)

    @cached_property
    def ledger(self) -> Ledger:
        """Its records: of what is searched, how, for what and on which data. Another question has another ledger, of the same runs."""
        sweep, base = self.sweep, self._experiment({}, *self._asked)
        asked = sweep.model_dump(mode="json", include={"space", "search", "seed", "metrics", "halving"})
        # The order of keys counts the points of a grid, and of metrics the first one chooses: a digest sorts mappings.
        asked |= {key: list(asked[key].items()) for key in ("space", "metrics")}
        concurrent = sweep.concurrent if sweep.search == "optuna" else 0
        question = [value_of(base, key) for key in QUESTION]
        facts = [VERSION, asked, concurrent, self.manifest.hash, name_fields(base), name_fields(base, "end"), question]
        return Ledger(self.store.at(f"ledger/{digest(facts)[:16]}"))

    def corner_trials(self) -> list[Trial]:
        """Trials at the corners of the space: what there may be where nobody knows yet what there will be."""
        return [self.trial(number, point) for number, point in enumerate(self.space.corners())]

    def check(self, trials: Sequence[Trial]) -> None:
        """Refuse halving that could not be done with these trials, or those at the corners of the space.

        Raises:
            ConfigError: naming the key, and what to give it.
        """
        if (halving := self.sweep.halving) is None:
            return
        clips = min(halving.clips, int(self.manifest.counts(SPLIT).sum()))
        if clips < (needed := halving.clips_needed(self.sweep.most)):
            raise ConfigError(
                f"halving on {clips} clips of {SPLIT} could stop nothing: at an error of {halving.error:g} over "
                f"{len(halving.rungs)} rungs and {self.sweep.most} trials it takes {needed} clips. Raise halving.clips or halving.error, "
                "lower the number of rungs, or leave halving out"
            )
        for trial in [*trials, *self.corner_trials()]:
            if LAST not in stages_of(trial.experiment.model):
                raise ConfigError(f"trial {trial.text} has no stage {LAST}, in which halving compares trials: leave halving out")
            end, batch = stage_end(trial.experiment, LAST, self.manifest), trial.experiment.optim.batch[LAST]
            if halving.rungs[-1] > end - batch:
                raise ConfigError(
                    f"the last rung of halving.rungs is at {halving.rungs[-1]} items, but trial {trial.text} ends at {end} "
                    f"(steps of {batch}): a rung lies before the last step of every trial"
                )

    @property
    def _asked(self) -> tuple[str, ...]:
        return f"evaluation.split={SPLIT}", "evaluation.baselines=false"

    def _early_points(self) -> list[Point]:
        """Points that are looked at before anything starts: what will be tried, or what might be."""
        if self.sweep.search == "grid":
            return self.space.grid()[: self.sweep.most]
        points = (suggest("random", self.space, (), self.sweep.seed, number, (), lambda _: True) for number in range(self.sweep.most))
        return [point for point in points if point is not None]

    def _run_of(self, point: Point) -> str:
        """Name of the run at a point.

        Raises:
            ConfigError: if no experiment is like that.
        """
        key = json.dumps(point)
        if key not in self._runs:
            self._runs[key] = self._experiment(point).run.name
        return self._runs[key]

    def _experiment(self, point: Point, *more: str) -> Experiment:
        """The experiment at a point: its run's name, any free telemetry port, and what else is given."""
        fixed = [f"data.manifest={json.dumps(self.manifest.hash)}", "telemetry.port=0", *more]
        experiment = anchored(self.sweep.load(self.overrides, assignments(point), fixed))
        return _renamed(experiment, name=f"{self.sweep.name}-{digest(name_fields(experiment))[:8]}")

    def _shared(self, experiment: Experiment) -> tuple[Experiment, Experiment | None]:
        """The experiment with the autoencoder that it takes, and that one's; a run that began with its own goes on with that."""
        first = first_stage(_renamed(experiment, name=""), self.sweep.name)
        try:
            url = f"runs/{experiment.run.name}/config.yaml"
            begun = build(yaml.safe_load(self.home.read(url)), f"{self.home.url}/{url}").run.autoencoder
        except NotFound:
            begun = first.run.name if first else ""
        if first is None or begun != first.run.name:
            return experiment, None
        return _renamed(experiment, autoencoder=begun), first


def _renamed(experiment: Experiment, **run: str) -> Experiment:
    return experiment.model_copy(update={"run": experiment.run.model_copy(update=run)})


def _manifest(sweep: Sweep, overrides: Sequence[str], store: Store) -> Manifest:
    """The dataset state that every trial uses."""
    experiment = anchored(sweep.load(overrides))
    try:
        wanted = experiment.data.manifest or json.loads(store.read("sweep.json"))["manifest"]
    except NotFound:
        wanted = ""
    manifest = load_manifest(open_store(experiment.data.url), wanted)
    if manifest.split(SPLIT).appropriateness is None:
        raise ValueError(f"split {SPLIT} of {experiment.data.url} has no appropriateness matrix, so trials cannot be compared on it")
    return manifest
