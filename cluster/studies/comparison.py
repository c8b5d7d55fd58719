"""A comparison: rows of settings times seeds, each a run of its own, and one table of what they reach.

Runs resume as runs do and are kept, so the same comparison again does what is left, and then only prints. Rows whose stage 1 is the
same share it: the first one's run trains the autoencoder of a seed, the others take it over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from cluster.config.identity import digest, identity, name_fields
from cluster.config.loading import ConfigError
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.config.spec import Spec, assignments
from cluster.driver.pin import pin
from cluster.driver.run import STEPS, execute
from cluster.evaluation.plan import plan_evaluation
from cluster.evaluation.rows import MODEL, ONLINE_ORACLE, ORACLE, RANDOM, UNTRAINED, WRONG, rows_of
from cluster.runs.saved import SavedRun, open_run
from cluster.telemetry.display import Display
from reactdiff.config import ENCODING
from reactdiff.metrics.official import merge
from reactdiff.metrics.partial import PartialScores
from reactdiff.metrics.report import gap_closed
from reactdiff.stage import flops_per_item, stages_of

ORACLES = (ORACLE, ONLINE_ORACLE)
METRICS = ("FRCorr", "FRDist", "FRDiv", "FRVar", "FRSyn_varying")


class Comparison(Spec):
    """The keys of a comparison's file."""

    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Every row is trained once with each.")
    rows: dict[str, dict[str, Any]] = Field(min_length=1, description="Name -> dotted keys of the experiment and their values.")


@dataclass(frozen=True)
class ComparisonRun:
    """One row under one seed; its run is named by the comparison and by what it computes."""

    row: str
    experiment: Experiment

    def open(self) -> SavedRun:
        """Its run, once it was started."""
        return open_run(self.experiment.run.name, self.experiment.run.store)


def comparison_runs(comparison: Comparison, overrides: Sequence[str]) -> list[ComparisonRun]:
    """Every row under every seed, in an order in which a shared autoencoder is trained before it is taken.

    Raises:
        ConfigError: for a key or value that no experiment has, or rows that are one run.
    """
    found: dict[str, ComparisonRun] = {}
    owners: dict[str, str] = {}
    for seed in comparison.seeds:
        for row, keys in comparison.rows.items():
            experiment = anchored(comparison.load(overrides, assignments(keys), [f"seed={seed}", "telemetry.port=0"]))
            key = _stage_1(experiment)
            owner = owners.get(key, "") if "diffusion" in stages_of(experiment.model) else ""
            experiment = _with(experiment, autoencoder=owner)
            experiment = _with(experiment, name=f"{comparison.name}-{digest(name_fields(experiment))[:8]}")
            owners.setdefault(key, experiment.run.name)
            if (twin := found.setdefault(experiment.run.name, ComparisonRun(row, experiment))).row != row:
                raise ConfigError(
                    f"{comparison.name}: rows {twin.row!r} and {row!r} would be the same run; rows differ in keys that --help of "
                    "jobs/train.py calls identity, not only in where they run or how long"
                )
    return list(found.values())


def _with(experiment: Experiment, **run: str) -> Experiment:
    return experiment.model_copy(update={"run": experiment.run.model_copy(update=run)})


def _stage_1(experiment: Experiment) -> str:
    """Stands for everything the autoencoder depends on."""
    fields = identity(experiment)
    optim = {name: value for name, value in fields.items() if name.startswith("optim.")}
    optim = {name: value["autoencoder"] if isinstance(value, dict) else value for name, value in optim.items()}
    data = {name: value for name, value in fields.items() if name == "seed" or name.startswith("data.")}
    model = [fields[f"model.{name}"] for name in (*ENCODING, "init_from")]
    return digest([optim, data, experiment.optim.epochs["autoencoder"], model])


def compare(comparison: Comparison, overrides: Sequence[str], display: Display) -> str:
    """Bring every run to its end, and say what they reach.

    Returns:
        A table in Markdown: over the seeds mean and standard deviation, with 95 % bootstrap intervals of FRCorr over the clips.
    """
    every = comparison_runs(comparison, overrides)
    for number, run in enumerate(every):
        display.say(f"{number + 1} of {len(every)}: {run.row}, seed {run.experiment.seed}, run {run.experiment.run.name}")
        execute(run.experiment, pin(run.experiment, comparison.name), STEPS, display)
    parts: dict[str, dict[int, PartialScores]] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for run in every:
        saved = run.open()
        sizes.setdefault(run.row, size(saved))
        for name, part in scored(saved).items():
            label = run.row if name == MODEL else f"{name} ({run.row})" if name in (WRONG, UNTRAINED) else name
            parts.setdefault(label, {})[run.experiment.seed] = part  # baselines are the same whichever row they stand beside
    return markdown({row: list(each.values()) for row, each in parts.items()}, sizes)


def scored(saved: SavedRun) -> dict[str, PartialScores]:
    """What the evaluation of a finished run kept, by row."""
    plan = plan_evaluation(saved.experiment, saved.store, saved.latents(), saved.diffusion())
    return {row: plan.read_row(row) for row in rows_of(plan)}


def size(saved: SavedRun) -> tuple[int, float]:
    """Parameters of all stages, and GFLOP of training on one item of the last one."""
    parameters, flops = 0, 0.0
    for stage in stages_of(saved.experiment.model):
        kind = saved.export(stage).kind
        with torch.device("meta"):
            module = kind.module()
        flops = flops_per_item(kind) / 1e9
        parameters += sum(parameter.numel() for parameter in module.parameters())
    return parameters, flops


def markdown(parts: Mapping[str, Sequence[PartialScores]], sizes: Mapping[str, tuple[int, float]]) -> str:
    """The table: a line for each row, of its parts under every seed."""
    means = {row: float(np.mean([merge([part]).official["FRCorr"] for part in each])) for row, each in parts.items()}
    oracles = [name for name in ORACLES if name in parts]
    ways = [f"way to {name}" for name in oracles] if RANDOM in parts else []
    head = ["", "FRCorr ↑", "95 % over clips", *ways, "FRDist ↓", "FRDiv", "FRVar", "FRSyn, varying ↓", "parameters", "GFLOP / item"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row, each in parts.items():
        scores = [one.official | one.repaired for one in (merge([part]) for part in each)]
        # The seeds' mean for every clip, then the clips drawn anew: what another test set would have given.
        mean_of_seeds = replace(each[0], values=np.mean([part.values for part in each], axis=0))
        low, high = merge([mean_of_seeds]).intervals["FRCorr"]
        closed = [f"{gap_closed(means[row], means[RANDOM], means[name]):.0%}" for name in oracles] if ways else []
        corr, *others = (_spread([score[metric] for score in scores]) for metric in METRICS)
        parameters, flops = sizes.get(row, (0, 0.0))
        counted = [f"{parameters:,}", f"{flops:.2f}"] if parameters else ["", ""]
        lines.append([row, corr, f"{low:.2f} .. {high:.2f}", *closed, *others, *counted])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    """Mean and, over several seeds, their standard deviation; a dash where it is undefined."""
    if np.isnan(values).any():
        return "–"
    mean, digits = float(np.mean(values)), 3 if abs(np.mean(values)) < 10 else 1
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and np.std(values) > 0 else ""
    return f"{mean:.{digits}f}{spread}"
