"""The same command finds its run for ever: names are golden values, and a field that is added later leaves them as they are."""

import json
from pathlib import Path

import pytest

from cluster.config.identity import ORIGINAL_FIELDS, ends, identity, name_fields
from cluster.config.loading import load
from cluster.config.schema import Experiment
from cluster.config.spec import Spec
from cluster.data.manifest import Manifest
from cluster.driver.pin import run_name
from cluster.studies.comparison import Comparison, comparison_runs
from cluster.studies.sweep import OpenSweep, Sweep
from reactdiff.config import Model, Optim, field
from tests.tiny import ROOT

CONFIGS = ROOT / "jobs" / "configs"
DATASET = "0123456789abcdef0123456789abcdef"
RUNS = {"demo": "demo-51f31449", "online": "online-a5082c18", "react2024": "react2024-e04336ca"}
TRIALS = ["demo-sweep-69f5475b", "demo-sweep-796cd5af", "demo-sweep-201b0d74", "demo-sweep-d65fa655"]
"""Run of each trial of the demo's sweep."""

ROWS = {
    "ReactDiff, x0": "af91c7d4 da55c17f 5d88c922",
    "ReactDiff, as published": "cf603449 f6c99e79 fb887ddd",
    "ReactDiff, epsilon": "89b5dffb dfb8680d 4bb7ce63",
    "ReactDiff, v": "879e73e1 54dd223d 8e3516f3",
    "transformer, x0": "ca3f95ac b3d1ac25 ccb908e9",
    "no intra-class attention": "160c5d7b 09be9b76 34c00d49",
    "no inter-class attention": "0441cd5b dce0cbfb 5c8bd4bf",
    "face only, also of the target": "889b7ebd a2a3f58d 0864d94b",
    "voice only, also of the target": "d6a5fb99 0344a612 a3bef837",
    "Trans-VAE": "1a097232 f9dd4596 186d7aba",
    "BeLFusion, x0": "82a1f4a8 168234cb f2d96414",
    "transformer, x0, online": "dceb4b99 8714732a 1696a147",
    "PerFRDiff, x0, online": "80053976 3a7a231d e58de908",
    "transformer, x0, squared errors": "f04c57a1 a307450d e327a4cd",
    "and batches of 2": "94617e7b 8c080f88 c415603c",
    "and tokens of 5 frames, lags": "4c2ca66d e37a6b81 b8e65ff3",
    "and variance 1 at EDM's levels": "7662f35f d3e1b341 faf8e7fa",
    "recipe": "702e3dfa 465b7aaf d3e7062e",
    "recipe, equal operations": "82050118 2b91292c aa081907",
    "recipe, online": "b7be9ed2 a67c72dc 9fbdb92f",
    "ReactDiff, as published, ten times the items": "feb2277d c3c6544b 4db85c4b",
}
"""Row -> the ends of its runs' names, under seeds 0, 1 and 2."""


class LaterModel(Model):
    """The model of a later release, with one field more."""

    stride: int = field(50, "Frames that are drawn at a time.")


class LaterOptim(Optim):
    """Its optimiser, with another end."""

    plateau: int = field(0, "Epochs without a better validation before the end.", kind="end")


class LaterExperiment(Experiment):
    """Its tree."""

    model: LaterModel = LaterModel()
    optim: LaterOptim = LaterOptim()


def later(experiment: Experiment, **model: object) -> Experiment:
    """An experiment as a later release reads it."""
    tree = json.loads(experiment.model_dump_json())
    return LaterExperiment.model_validate(tree | {"model": tree["model"] | model})


@pytest.fixture(params=["today", "later"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies read experiments as this release does, or as a later one."""
    read = Spec.load
    if request.param == "later":
        monkeypatch.setattr(Spec, "load", lambda self, *layers: later(read(self, *layers)))


@pytest.mark.parametrize("config", RUNS)
def test_a_run_has_the_name_it_always_had(config: str) -> None:
    assert run_name(load(CONFIGS / f"{config}.yaml"), config, DATASET) == RUNS[config]


@pytest.mark.usefixtures("release")
def test_the_trials_of_the_demo_s_sweep_have_the_names_they_always_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={})
    manifest._hash = DATASET
    monkeypatch.setattr("cluster.studies.sweep._manifest", lambda *_: manifest)
    opened = OpenSweep(Sweep.read(CONFIGS / "sweep.yaml"), [f"run.store={tmp_path}"])
    assert [trial.run for trial in opened.known_trials(opened.ledger)] == TRIALS


@pytest.mark.usefixtures("release")
def test_the_rows_of_the_comparison_have_the_names_they_always_had() -> None:
    found: dict[str, list[str]] = {}
    for run in comparison_runs(Comparison.read(CONFIGS / "science.yaml"), []):
        found.setdefault(run.row, []).append(run.experiment.run.name.removeprefix("science-"))
    assert {row: " ".join(names) for row, names in found.items()} == ROWS


@pytest.mark.parametrize("config", RUNS)
def test_a_field_added_later_enters_a_name_only_where_it_is_not_its_default(config: str) -> None:
    now = load(CONFIGS / f"{config}.yaml")
    assert "model.stride" in identity(later(now)) and "optim.plateau" in ends(later(now))
    assert name_fields(later(now)) == name_fields(now) and name_fields(later(now), "end") == name_fields(now, "end")
    assert run_name(later(now), config, DATASET) == run_name(later(now, stride=50), config, DATASET) == RUNS[config]
    assert run_name(later(now, stride=25), config, DATASET) != RUNS[config]


def test_the_fields_that_names_always_stand_for_are_there() -> None:
    there = {*identity(load(None)), *ends(load(None))}
    assert there >= ORIGINAL_FIELDS, "a field that goes renames every run"


@pytest.mark.parametrize(
    ("parts", "row", "same"),
    [
        ("offline", "as it is", "recipe"),
        ("online", "as it is", "recipe, online"),
        ("online", "transformer, x0, online", "transformer, x0, online"),
    ],
)
def test_what_the_parts_begin_with_is_trained_as_its_row_of_the_comparison_and_scored_on_val(parts: str, row: str, same: str) -> None:
    found = []
    for file, name in ((f"science/{parts}.yaml", row), ("science.yaml", same)):
        runs = [run.experiment for run in comparison_runs(Comparison.read(CONFIGS / file), []) if run.row == name]
        found.append([(name_fields(run) | {"diffusion.ema_every": 0}, ends(run)) for run in runs])
        assert len(runs) == 3 and {run.evaluation.split for run in runs} == {"test" if file == "science.yaml" else "val"}
    assert found[0] == found[1]


def test_parts_that_only_draw_in_another_way_or_share_an_autoencoder_are_not_trained_for_it() -> None:
    offline, online = (comparison_runs(Comparison.read(CONFIGS / f"science/{parts}.yaml"), []) for parts in ("offline", "online"))
    first = offline[0].trained
    drawn = [run.row for run in offline if run.trained == first]
    assert len(drawn) == 12 and {"DDIM", "averages of length 0.20", "guided by an earlier state, 2"} < set(drawn)
    owners = {run.row: run.experiment.run.name for run in online if run.experiment.seed == 0}
    taken = {run.row: run.experiment.run.autoencoder for run in online if run.experiment.seed == 0}
    assert taken["and squared errors"] == taken["and variance 1"] == owners["transformer, x0, online"]
    assert taken["and chunks of 10"] == owners["latents"] and taken["and attributes instead of latents"] == ""


@pytest.mark.parametrize(("best", "row"), [("best-offline", "recipe"), ("best-online", "recipe, online")])
def test_the_recipe_of_the_comparison_is_that_of_the_configuration(best: str, row: str) -> None:
    recipe = next(run.experiment for run in comparison_runs(Comparison.read(CONFIGS / "science.yaml"), []) if run.row == row)
    shipped = load(CONFIGS / f"{best}.yaml")
    assert recipe.diffusion == shipped.diffusion
    unused = dict.fromkeys(("hidden", "latent", "channels", "multipliers", "condition", "dropout"))  # of a first stage or a UNet
    assert recipe.model.model_dump() | unused == shipped.model.model_dump() | unused
    same = ("batch", "lr", "ema", "warmup")
    assert [getattr(recipe.optim, name)["diffusion"] for name in same] == [getattr(shipped.optim, name)["diffusion"] for name in same]
