"""A sweep: every combination of a grid as a run of its own, under Ray Tune; this is the only module that knows Tune.

Trials resume as runs do, by their own state, so Tune's is not needed: the same sweep again skips what is scored and goes on with
the rest. All trials use one state of the dataset, the current one at the sweep's first start, and are compared on `val`.
"""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator
from ray import tune

from cluster.config.identity import digest, name_fields
from cluster.config.loading import ConfigError, to_yaml, value_of
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.config.spec import Spec, assignments, known_metric
from cluster.data.manifest import load_manifest
from cluster.driver.pin import pin
from cluster.driver.run import STEPS, execute
from cluster.evaluation.rows import MODEL
from cluster.runs.environment import command
from cluster.runs.lease import Lease
from cluster.runs.state import read_state
from cluster.runtime.ray_cluster import connect
from cluster.storage import AlreadyExists, NotFound, Store, open_store
from cluster.telemetry.display import Display

SPLIT = "val"
"""What trials are compared on: never what is reported in the end."""

QUESTION = ("evaluation.split", "evaluation.predictions", "evaluation.clips")
"""What a trial's scores depend on beside its weights."""


class Sweep(Spec):
    """The keys of a sweep's file."""

    grid: dict[str, list[Any]] = Field(min_length=1, description="Dotted keys of the experiment, each with the values to try.")
    metric: str = Field("FRCorr", description="Metric by which the best trial is chosen.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of it is better.")
    concurrent: int = Field(1, ge=1, description="Trials at the same time; the cluster needs room for the ranks of all.")

    _metric = field_validator("metric")(known_metric)

    @field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if empty := [key for key, values in grid.items() if not values]:
            raise ValueError(f"{empty[0]} has no value to try")
        return grid


@dataclass(frozen=True)
class Trial:
    """One combination of the grid; its run is named by the sweep and by what it computes."""

    parameters: dict[str, Any]
    experiment: Experiment

    @property
    def run(self) -> str:
        """Name of its run."""
        return self.experiment.run.name

    @property
    def record(self) -> str:
        """Key of its scores in the sweep's folder, where they are once it is done; another end or question has another key."""
        question = [value_of(self.experiment, key) for key in QUESTION]
        asked = [name_fields(self.experiment), name_fields(self.experiment, "end"), *question]
        return f"trials/{digest(asked)}.json"

    @property
    def text(self) -> str:
        """The parameters for people, and for Prometheus."""
        return ",".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.parameters.items())


@dataclass(frozen=True)
class Outcome:
    """Where a trial stands: a status of `cluster.runs.state`, the reason of a failure, its scores by metric once it is DONE."""

    trial: Trial
    state: str
    why: str = ""
    scores: dict[str, float | None] | None = None

    def value(self, metric: str) -> float | None:
        """Its score, None where there is none or it is undefined."""
        return self.scores[metric] if self.scores else None


def open_home(sweep: Sweep, overrides: Sequence[str]) -> Store:
    """The store of the sweep and of its trials' runs."""
    return open_store(anchored(sweep.load(overrides)).run.store)


def sweep_folder(sweep: Sweep, home: Store) -> Store:
    """The sweep's folder in it."""
    return home.at(f"sweeps/{sweep.name}")


def trials(sweep: Sweep, overrides: Sequence[str]) -> list[Trial]:
    """Every combination of the grid, the last key changing fastest; writes nothing.

    Raises:
        ConfigError: for a key or value that no experiment has, a key that is set twice, or combinations that are one run.
        ValueError: if the dataset cannot be read, or has no `val` split that can be scored.
    """
    if twice := {text.partition("=")[0] for text in overrides} & sweep.grid.keys():
        raise ConfigError(f"{min(twice)} is in the grid of sweep {sweep.name}; change it there, not as an override")
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    for parameters in points:
        sweep.load(overrides, assignments(parameters))  # a wrong key or value, before anything is looked up
    manifest = _manifest(sweep, overrides)
    found: dict[str, Trial] = {}
    scored = (f"evaluation.split={SPLIT}", "evaluation.baselines=false")
    for parameters in points:
        trial = Trial(parameters, _experiment(sweep, overrides, parameters, manifest, *scored))
        if trial.run in found:
            raise ConfigError(
                f"sweep {sweep.name}: {found[trial.run].text} and {trial.text} would be the same run, because they compute the same; "
                "a grid is made of different values of keys that --help of jobs/train.py calls identity"
            )
        found[trial.run] = trial
    return list(found.values())


def search(sweep: Sweep, overrides: Sequence[str], display: Display) -> list[Outcome]:
    """Bring every trial to its end, then write `trials.json` and, of the best one, the experiment `best.yaml`.

    A trial that fails does not stop the others; the same call again goes on with it.

    Raises:
        ConfigError, ValueError: before anything starts, as `trials`.
        Held: if another process is at this sweep.
        Superseded: if one has taken it over.
    """
    trials(sweep, overrides)  # what cannot be run is refused before anything is written
    home = open_home(sweep, overrides)
    store = sweep_folder(sweep, home)
    store.assert_conditional_writes()
    with Lease(store, command(), wait=False) as lease:
        every = trials(sweep, overrides)  # whoever held the lease may have pinned the dataset
        waiting = [trial for trial in every if not store.exists(trial.record)]
        done = len(every) - len(waiting)
        display.say(f"sweep {sweep.name}: {len(every)} trials, {done} of them done, {sweep.concurrent} at a time, in {store.url}")
        manifest = every[0].experiment.data.manifest
        try:
            store.create("sweep.json", json.dumps({"manifest": manifest}).encode())
        except AlreadyExists:
            pass  # the first start pinned the dataset
        errors = _tune(sweep, waiting, store) if waiting else {}
        outcomes = [_failed(outcome(sweep, trial, home), errors.get(trial.run)) for trial in every]
        lease.assert_held()
        store.put("trials.json", json.dumps([_row(one) for one in outcomes], indent=1).encode())
        if (winner := best(sweep, outcomes)) is not None:
            store.put("best.yaml", to_yaml(_experiment(sweep, overrides, winner.trial.parameters, manifest)).encode())
        return outcomes


def outcome(sweep: Sweep, trial: Trial, home: Store) -> Outcome:
    """Where a trial of a sweep in this store stands."""
    try:
        return Outcome(trial, "DONE", scores=json.loads(sweep_folder(sweep, home).read(trial.record))["scores"])
    except NotFound:
        state = read_state(home.at(f"runs/{trial.run}"))
    if state is None:
        return Outcome(trial, "PENDING")
    return Outcome(trial, "STOPPED" if state.status == "DONE" else state.status, state.why)  # done, but not to this end or question


def _failed(one: Outcome, error: Exception | None) -> Outcome:
    """The outcome, with what its driver died of, unless the run could say itself why it failed."""
    if error is None or one.state in ("DONE", "FAILED"):
        return one
    return replace(one, state="FAILED", why=str(error).strip().splitlines()[-1])


def best(sweep: Sweep, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The trial with the best metric, the first of equals; None while one may still win, or if none has a score."""
    if any(one.state not in ("DONE", "FAILED") for one in outcomes):
        return None
    sign = 1 if sweep.mode == "max" else -1
    scored = [(sign * value, one) for one in outcomes if (value := one.value(sweep.metric)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _manifest(sweep: Sweep, overrides: Sequence[str]) -> str:
    """Hash of the dataset state that every trial uses."""
    experiment = anchored(sweep.load(overrides))
    try:
        wanted = experiment.data.manifest or json.loads(sweep_folder(sweep, open_home(sweep, overrides)).read("sweep.json"))["manifest"]
    except NotFound:
        wanted = ""
    manifest = load_manifest(open_store(experiment.data.url), wanted)
    if manifest.split(SPLIT).appropriateness is None:
        raise ValueError(f"split {SPLIT} of {experiment.data.url} has no appropriateness matrix, so trials cannot be compared on it")
    return manifest.hash


def _experiment(sweep: Sweep, overrides: Sequence[str], parameters: dict[str, Any], manifest: str, *more: str) -> Experiment:
    """The experiment of one combination: its run's name, any free telemetry port, and what else is given."""
    fixed = [f"data.manifest={json.dumps(manifest)}", "telemetry.port=0", *more]
    experiment = anchored(sweep.load(overrides, assignments(parameters), fixed))
    name = f"{sweep.name}-{digest(name_fields(experiment))[:8]}"
    return experiment.model_copy(update={"run": experiment.run.model_copy(update={"name": name})})


def _tune(sweep: Sweep, waiting: list[Trial], store: Store) -> dict[str, Exception]:
    """Run these trials; each is a process beside the ranks it starts, and reserves next to nothing. Returns the errors by run."""
    connect(cpus=sweep.concurrent * waiting[0].experiment.workers.least + 1)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interruption ends this process, as that of any job does
    function = tune.with_parameters(_trial, trials={trial.run: trial for trial in waiting}, store=store)
    results = tune.Tuner(
        tune.with_resources(function, {"cpu": 0.01}),  # with a whole CPU each, drivers could leave none for ranks
        param_space={"run": tune.grid_search([trial.run for trial in waiting])},
        tune_config=tune.TuneConfig(max_concurrent_trials=sweep.concurrent),
        run_config=tune.RunConfig(name="tune", storage_path=store.url, verbose=0),
    ).fit()
    every = [results[number] for number in range(len(results))]
    return {result.config["run"]: result.error for result in every if result.config and result.error}


def _trial(config: dict[str, str], trials: dict[str, Trial], store: Store) -> None:
    """The driver of one trial, as Tune starts it."""
    trial = trials[config["run"]]
    with Display() as display:
        scores = execute(trial.experiment, pin(trial.experiment, trial.run), STEPS, display, trial.text)[MODEL].to_dict()
    record = {"run": trial.run, "parameters": trial.parameters, "scores": scores["official"] | scores["repaired"]}
    store.put(trial.record, json.dumps(record, indent=1).encode())
    tune.report(record["scores"])


def _row(one: Outcome) -> dict[str, Any]:
    return {"run": one.trial.run, "parameters": one.trial.parameters, "state": one.state, "why": one.why, "scores": one.scores}
