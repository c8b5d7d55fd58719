"""A comparison: rows of settings times seeds, each a run of its own, and one table of what they reach.

Runs resume as runs do and are kept, so the same comparison again does what is left, and then only prints. A run whose scores are kept
in a file is not trained at all. Rows whose stage 1 is the same share it: the first one's run trains the autoencoder of a seed, the
others take it over. Rows that differ only in how they draw (`SAMPLING`) share one run, which is asked in each way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from cluster.config.identity import digest, ends, identity, name_fields
from cluster.config.loading import ConfigError
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.config.spec import Spec, assignments
from cluster.data.manifest import load_appropriateness, load_manifest
from cluster.driver.pin import pin
from cluster.driver.run import STEPS, check_run, execute
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.ground_truth import of_first_clips
from cluster.evaluation.plan import plan_evaluation
from cluster.evaluation.rows import CUT, MODEL, REAL_PAST, UNTRAINED, WRONG, chunk_of, rows_of
from cluster.runs.saved import SAMPLING, SavedRun, open_run
from cluster.storage import open_store
from cluster.studies.comparison_pairs import independent_groups
from cluster.studies.comparison_table import TableRow, beside
from cluster.studies.kept_scores import ClipScores, RunScores, read_all_scores, read_scores, scores_key, write_scores
from cluster.telemetry.display import Display
from reactdiff.config import ENCODING, STAGES
from reactdiff.stage import flops_per_item, stages_of

OF_A_MODEL = (CUT, REAL_PAST, WRONG, UNTRAINED)
"""Rows beside a model that are of it alone; others are the same whichever model they stand beside."""


class Comparison(Spec):
    """The keys of a comparison's file."""

    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Every row is trained once with each.")
    dyads: dict[str, PositiveInt] = Field({}, description="URL of a smaller demo that rows name -> its training clips.")
    rows: dict[str, dict[str, Any]] = Field(min_length=1, description="Name -> dotted keys of the experiment and their values.")


@dataclass(frozen=True)
class ComparisonRun:
    """One row under one seed.

    Attributes:
        row: its name.
        experiment: what it asks for; named by the comparison and by what is computed.
        trained: the experiment of the run that it is drawn from; its own, or one that draws in another way.
        drawn: how that run is asked to draw, where not as it was trained.
    """

    row: str
    experiment: Experiment
    trained: Experiment
    drawn: tuple[str, ...] = ()

    def scores(self, display: Display) -> RunScores:
        """What is kept of its run, which is finished."""
        saved = open_run(self.trained.run.name, self.trained.run.store).with_sampling(self.drawn)
        if self.experiment.run.name != self.trained.run.name or self.experiment.evaluation != self.trained.evaluation:
            asked = saved.experiment.model_copy(update={"evaluation": self.experiment.evaluation})
            saved = replace(saved, experiment=asked)
            evaluate(asked, saved.store, saved.latents(), saved.diffusion(), display.counter("evaluation", "parts"))
        return run_scores(saved)


def comparison_runs(comparison: Comparison, overrides: Sequence[str]) -> list[ComparisonRun]:
    """Every row under every seed, in an order in which a shared autoencoder is trained before it is taken.

    Raises:
        ConfigError: for a key or value that no experiment has, or rows that are one run.
    """
    found: dict[tuple[str, ...], ComparisonRun] = {}
    owners: dict[str, str] = {}
    trained: dict[str, Experiment] = {}
    named: dict[str, str] = {}
    for seed in comparison.seeds:
        for row, keys in comparison.rows.items():
            experiment = anchored(comparison.load(overrides, assignments(keys), [f"seed={seed}", "telemetry.port=0"]))
            key, training = _stage_1(experiment), _training(experiment)
            owner = owners.get(key, "") if stages_of(experiment.model) == STAGES else ""
            experiment = _with(experiment, autoencoder=owner)
            named_by = name_fields(experiment) | {key: value for key, value in keys.items() if key == "data.url"}
            experiment = _with(experiment, name=f"{comparison.name}-{digest(named_by)[:8]}")
            if stages_of(experiment.model) == STAGES:
                owners.setdefault(key, experiment.run.name)
            run = ComparisonRun(row, experiment, trained.setdefault(training, experiment))
            run = replace(run, drawn=_drawn(experiment, run.trained))
            same = (training, *run.drawn, experiment.evaluation.model_dump_json())
            twin = found.setdefault(same, run)
            if twin is not run or named.setdefault(experiment.run.name, training) != training:
                raise ConfigError(
                    f"{comparison.name}: row {row!r} would be the same run as one before it; rows differ in keys that --help of "
                    "jobs/train.py calls identity, or in their evaluation, not only in where they run or how long"
                )
    return list(found.values())


def _training(experiment: Experiment) -> str:
    """Stands for everything that trained weights depend on."""
    drawing = {f"diffusion.{name}" for name in SAMPLING}
    fields = {name: value for name, value in name_fields(experiment).items() if name not in drawing}
    return digest([fields, ends(experiment), experiment.data.url])


def _drawn(experiment: Experiment, trained: Experiment) -> tuple[str, ...]:
    """The `key=value` texts by which a run of one experiment is asked to draw as another one would."""
    asked, was = (one.diffusion.model_dump(mode="json") for one in (experiment, trained))
    return tuple(assignments({f"diffusion.{name}": asked[name] for name in SAMPLING if asked[name] != was[name]}))


def _with(experiment: Experiment, **run: str) -> Experiment:
    return experiment.model_copy(update={"run": experiment.run.model_copy(update=run)})


def _stage_1(experiment: Experiment) -> str:
    """Stands for everything the autoencoder depends on."""
    fields = identity(experiment)
    optim = {name: value for name, value in fields.items() if name.startswith("optim.")}
    optim = {name: value["autoencoder"] if isinstance(value, dict) else value for name, value in optim.items()}
    data = {name: value for name, value in fields.items() if name == "seed" or name.startswith("data.")}
    model = [fields[f"model.{name}"] for name in (*ENCODING, "init_from")]
    return digest([optim, data, experiment.data.url, experiment.optim.epochs["autoencoder"], model])


def compare(comparison: Comparison, overrides: Sequence[str], display: Display, kept: Path, keep: bool) -> dict[str, TableRow]:
    """Bring every run to its end, but for those whose scores are kept, and say what they reach.

    Args:
        comparison: its file.
        overrides: `key=value` texts for every run.
        display: that is told how it goes.
        kept: file of this comparison's scores; those in other files of its folder are taken up, too.
        keep: write the scores of all runs there.

    Returns:
        The lines of its table, by name.
    """
    every, here = comparison_runs(comparison, overrides), read_scores(kept)
    there = read_all_scores(kept.parent) | here
    keys = []
    for run in every:
        pinned = pin(run.experiment, comparison.name)
        keys.append(scores_key(run.experiment, pinned.manifest))
        if run.experiment.seed == comparison.seeds[0]:  # before hours of the others; the autoencoder that it will take is not there yet
            check_run(_with(run.experiment, autoencoder=""), pinned, STEPS)
    lent = {run.experiment.run.autoencoder for run, key in zip(every, keys, strict=True) if key not in there}
    mine: dict[str, RunScores] = {}
    finished = set[str]()
    for number, place in enumerate(in_turn(every), start=1):
        run, key = every[place], keys[place]
        experiment, seed = run.experiment, run.experiment.seed
        where = f"; its scores are in {kept.parent}" if key in there else ""
        drawn = f", drawn with {' '.join(run.drawn)}" if run.drawn else ""
        display.say(f"{number} of {len(every)}: {run.row}, seed {seed}, run {run.trained.run.name}{drawn}{where}")
        if key in there:
            if experiment.run.name in lent:
                execute(run.trained, pin(run.trained, comparison.name), STEPS[:1], display)
        else:
            if run.trained.run.name not in finished:
                execute(run.trained, pin(run.trained, comparison.name), STEPS, display)
                finished.add(run.trained.run.name)
            there[key] = run.scores(display)
        mine[key] = replace(there[key], name=f"{run.row}, seed {seed}")
        if keep and key not in here:  # at once, so that who is interrupted after an hour has an hour's scores
            write_scores(kept, here | mine)
    mine = {key: mine[key] for key in keys}
    if keep:
        write_scores(kept, mine)
    return _table(every, [mine[key] for key in keys])


def in_turn(every: Sequence[ComparisonRun]) -> list[int]:
    """Places of the runs in the order in which they are made: those of a longer first stage wait for all seeds of the others.

    Rows that share an autoencoder have first stages of one length, so that it is still trained before it is taken.
    """
    return sorted(range(len(every)), key=lambda place: every[place].experiment.optim.epochs["autoencoder"])


def _table(every: Sequence[ComparisonRun], found: Sequence[RunScores]) -> dict[str, TableRow]:
    rows: dict[str, TableRow] = {}
    for run, scored in zip(every, found, strict=True):
        for name, scores in scored.rows.items():
            label = run.row if name == MODEL else beside(name, run.row) if name in OF_A_MODEL else name
            sizes = (scored.parameters, scored.gflop, scored.tflop) if name == MODEL else None
            row = rows.setdefault(label, TableRow({}, chunk_of(run.experiment.model) if name in (MODEL, CUT) else None, sizes))
            row.seeds[run.experiment.seed] = scores  # baselines are the same whichever row they stand beside
    return rows


def scored_groups(experiment: Experiment, rows: Mapping[str, TableRow]) -> np.ndarray:
    """Which of the clips that were scored are independent of each other, as `independent_groups` has it.

    Raises:
        ConfigError: if rows were scored on other clips than others.
    """
    dataset = open_store(experiment.data.url)
    appropriate = load_appropriateness(dataset, load_manifest(dataset), experiment.evaluation.split)
    items = {len(scores.values) for row in rows.values() for scores in row.seeds.values()}
    if appropriate is None or len(items) != 1:
        raise ConfigError("rows that are scored on different clips cannot be compared clip by clip: give all the same evaluation.clips")
    return independent_groups(of_first_clips(appropriate, min(items) // 2))


def run_scores(saved: SavedRun) -> RunScores:
    """What is kept of a finished run."""
    plan = plan_evaluation(saved.experiment, saved.store, saved.latents(), saved.diffusion())
    rows = rows_of(saved.experiment, saved.clips.provenance)
    return RunScores("", *size(saved), {row: ClipScores.of(plan.read_row(row)) for row in rows})


def size(saved: SavedRun) -> tuple[int, float, float]:
    """Parameters of all stages, GFLOP of training on one item of the last one, and TFLOP of the training of all."""
    parameters, flops, total = 0, 0.0, 0.0
    for stage in stages_of(saved.experiment.model):
        export = saved.export(stage)
        with torch.device("meta"):
            module = export.kind.module()
        flops = flops_per_item(export.kind)
        parameters += sum(parameter.numel() for parameter in module.parameters())
        total += flops * export.progress
    return parameters, flops / 1e9, total / 1e12
