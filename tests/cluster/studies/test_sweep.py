"""Sweeps up to where trials start, and what is made of their scores; tests/jobs/test_tune.py runs one."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import ConfigError
from cluster.data.manifest import File, Manifest, Split, publish
from cluster.runs import lease
from cluster.runs.lease import LEASE, Lease
from cluster.storage import open_store
from cluster.studies.sweep import Outcome, Sweep, best, open_home, sweep_folder, trials
from tests.tiny import call

GRID = {"diffusion.schedule": ["cosine", "linear"], "model.inter_depth": [1, 2]}


def dataset(url: Path, **splits: Split) -> None:
    """A dataset without clips, or its next state: enough to plan with."""
    store = open_store(str(url))
    manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits=splits)
    publish(store, manifest, store.get("dataset.json")[1] if store.exists("dataset.json") else "")


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    dataset(tmp_path / "shards", train=Split(), val=Split(appropriateness=File(file="val/matrix.npy", hash="0" * 32)))
    return [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"]


def sweep(**keys: Any) -> Sweep:
    return Sweep.model_validate({"name": "tried", "grid": GRID} | keys)


def outcome(schedule: str, state: str, score: float | None = None) -> Outcome:
    trial: Any = schedule  # `best` does not look into it
    return Outcome(trial, state, scores={"FRCorr": score} if state == "DONE" else None)


def test_every_combination_of_the_grid_is_a_run_of_its_own(places: list[str]) -> None:
    found = trials(sweep(), places)
    texts = [f"diffusion.schedule={schedule},model.inter_depth={depth}" for schedule in ("cosine", "linear") for depth in (1, 2)]
    assert [trial.text for trial in found] == texts
    assert len({trial.run for trial in found}) == 4 and all(trial.run.startswith("tried-") for trial in found)
    assert [trial.experiment.diffusion.schedule for trial in found] == ["cosine", "cosine", "linear", "linear"]


def test_trials_are_compared_on_val_whatever_the_experiment_says(places: list[str]) -> None:
    assert {trial.experiment.evaluation.split for trial in trials(sweep(), [*places, "evaluation.split=test"])} == {"val"}


def test_the_same_sweep_finds_its_runs_again_wherever_they_are_computed(places: list[str]) -> None:
    assert [t.run for t in trials(sweep(), places)] == [t.run for t in trials(sweep(), [*places, "workers.count=3", "optim.epochs=300"])]


def test_a_later_end_is_not_yet_scored(places: list[str]) -> None:
    before, after = trials(sweep(), places), trials(sweep(), [*places, "optim.epochs=300"])
    assert not {trial.record for trial in before} & {trial.record for trial in after}


def test_a_sweep_stays_on_the_state_of_the_dataset_it_began_with(places: list[str], tmp_path: Path) -> None:
    first = trials(sweep(), places)
    home = open_home(sweep(), places)
    sweep_folder(sweep(), home).create("sweep.json", b'{"manifest": "%s"}' % first[0].experiment.data.manifest.encode())
    dataset(tmp_path / "shards", train=Split(), val=Split(appropriateness=File(file="val/other.npy", hash="1" * 32)))
    assert [trial.run for trial in trials(sweep(), places)] == [trial.run for trial in first]


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        ({"grid": {"diffusion.shedule": ["cosine"]}}, [], r"no key diffusion.shedule; did you mean diffusion.schedule\?"),
        ({"grid": {"diffusion.schedule": ["cosine", "sine"]}}, [], "diffusion.schedule = 'sine'"),
        ({"grid": {"workers.zero": [1, 2]}}, [], "workers.zero=1 and workers.zero=2 would be the same run"),
        ({}, ["model.inter_depth=3"], "model.inter_depth is in the grid"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is_written(
    places: list[str], tmp_path: Path, keys: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trials(sweep(**keys), [*places, *overrides])
    assert not (tmp_path / "store").exists()


def test_a_sweep_that_another_process_is_at_says_so_and_ends_well(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LOOK", 0.05)
    (tmp_path / "sweep.yaml").write_text("name: tried\ngrid: {diffusion.schedule: [cosine, linear]}")
    store = sweep_folder(sweep(), open_home(sweep(), places))
    with Lease(store, "the first one"):
        second = call("tune", "--config", tmp_path / "sweep.yaml", *places)
        assert f"{store.url} is held by host " in second.stdout and "(the first one), which is at work there" in second.stdout
        assert [entry.key for entry in store.list()] == [LEASE]


def test_a_dataset_without_a_val_split_is_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "shards", train=Split(), val=Split())
    with pytest.raises(ValueError, match="trials cannot be compared on it"):
        trials(sweep(), [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ngrid: {optim.lr: [1]}\nconcurent: 2", r"no key concurent; did you mean concurrent\?"),
        ("name: x\ngrid: {optim.lr: [1]}\nmetric: FRCor", r"no metric FRCor; did you mean FRCorr\?"),
        ("name: x\ngrid: {optim.lr: []}", "optim.lr has no value to try"),
        ("name: x", "grid: Field required"),
        ("- x", "mapping"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Sweep.read(tmp_path / "sweep.yaml")


def test_the_experiment_is_a_file_beside_the_sweep_s_or_a_tree_and_overrides_lie_over_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {hidden: 64, latent: 16}")
    rest = "overrides: {model.latent: 32}\ngrid: {optim.lr: [1.0e-4]}"
    for name, text in (("file", "base.yaml"), ("tree", "{model: {hidden: 64, latent: 16}}")):
        (tmp_path / f"{name}.yaml").write_text(f"name: x\nexperiment: {text}\n{rest}")
        model = Sweep.read(tmp_path / f"{name}.yaml").load().model
        assert (model.hidden, model.latent) == (64, 32)


def test_the_best_trial_has_the_most_or_the_least_and_is_the_first_of_equals() -> None:
    outcomes = [outcome("abcd"[i], "DONE", score) for i, score in enumerate((1.0, 3.0, 3.0, None))] + [outcome("e", "FAILED")]
    assert best(sweep(), outcomes) is outcomes[1]
    assert best(sweep(mode="min"), outcomes) is outcomes[0]


def test_there_is_no_best_trial_while_one_may_still_win_or_without_a_score() -> None:
    assert best(sweep(), [outcome("a", "DONE", 1.0), outcome("b", "RUNNING")]) is None
    assert best(sweep(), [outcome("a", "FAILED"), outcome("b", "DONE", None)]) is None
