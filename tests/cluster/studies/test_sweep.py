"""Sweeps up to where trials start: what a file says, and which runs that makes; tests/jobs/test_tune.py runs one."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config.loading import ConfigError
from cluster.data.manifest import File, Manifest, ShardTable, Split, publish
from cluster.runs import lease
from cluster.runs.lease import LEASE, Lease
from cluster.runtime.failures import AGAIN
from cluster.storage import open_store
from cluster.studies.sweep import OpenSweep, Sweep, Trial
from tests.tiny import call

SPACE = {"diffusion.schedule": ["cosine", "linear"], "model.inter_depth": [1, 2]}


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
    return Sweep.model_validate({"name": "tried", "space": SPACE} | keys)


def trials(sweep: Sweep, overrides: list[str]) -> list[Trial]:
    opened = OpenSweep(sweep, overrides)
    return opened.known_trials(opened.ledger)


def test_every_combination_of_the_grid_is_a_run_of_its_own(places: list[str]) -> None:
    found = trials(sweep(), places)
    texts = [f"diffusion.schedule={schedule},model.inter_depth={depth}" for schedule in ("cosine", "linear") for depth in (1, 2)]
    assert [trial.text for trial in found] == texts
    assert len({trial.run for trial in found}) == 4 and all(trial.run.startswith("tried-") for trial in found)
    assert [trial.experiment.diffusion.schedule for trial in found] == ["cosine", "cosine", "linear", "linear"]
    assert [trial.number for trial in found] == [0, 1, 2, 3]


def test_trials_are_compared_on_val_whatever_the_experiment_says(places: list[str]) -> None:
    assert {trial.experiment.evaluation.split for trial in trials(sweep(), [*places, "evaluation.split=test"])} == {"val"}


def test_the_same_sweep_finds_its_runs_again_wherever_they_are_computed(places: list[str]) -> None:
    assert [t.run for t in trials(sweep(), places)] == [t.run for t in trials(sweep(), [*places, "workers.count=3", "optim.epochs=300"])]


def test_trials_with_the_same_stage_1_take_one_autoencoder_and_those_with_another_take_another(places: list[str]) -> None:
    found = trials(sweep(), [*places, "optim.epochs={autoencoder: 3, diffusion: 7}", "optim.lr={autoencoder: 1e-3, diffusion: 2e-3}"])
    firsts = [trial.first for trial in found]
    names = [trial.experiment.run.autoencoder for trial in found]
    assert names == [first and first.run.name for first in firsts]
    assert names[0] == names[2] != names[1] == names[3] and all(name.startswith("tried-autoencoder-") for name in names)
    assert firsts[0] == firsts[2] and firsts[0] is not None
    assert (firsts[0].optim.epochs.autoencoder, firsts[0].optim.lr.autoencoder) == (3, 1e-3)
    others = trials(sweep(space={"diffusion.steps": [10, 20], "optim.lr.diffusion": [1e-4, 2e-4]}), places)
    assert len({trial.experiment.run.autoencoder for trial in others}) == 1 and len({trial.run for trial in others}) == 4
    rates = trials(sweep(space={"optim.lr.autoencoder": [1e-4, 2e-4], "seed": [0, 1]}), places)
    assert len({trial.experiment.run.autoencoder for trial in rates}) == 4


@pytest.mark.parametrize("key", ["run.autoencoder=theirs", "model.init_from=[theirs]"])
def test_an_autoencoder_that_comes_from_elsewhere_is_left_alone(places: list[str], key: str) -> None:
    assert {trial.first for trial in trials(sweep(space={"diffusion.schedule": ["cosine", "linear"]}), [*places, key])} == {None}


def test_a_run_that_began_with_an_autoencoder_of_its_own_goes_on_with_it(places: list[str], tmp_path: Path) -> None:
    before = trials(sweep(), places)
    store = open_store(f"{tmp_path}/store/runs/{before[1].run}")
    store.put("config.yaml", b"run: {autoencoder: ''}")
    after = trials(sweep(), places)
    assert [trial.run for trial in after] == [trial.run for trial in before]
    assert [trial.first is None for trial in after] == [False, True, False, False]
    assert after[1].experiment.run.autoencoder == ""


def test_another_question_has_another_ledger_and_more_trials_have_the_same(places: list[str]) -> None:
    def folder(given: Sweep, *more: str) -> str:
        return OpenSweep(given, [*places, *more]).ledger.url

    drawn = {"search": "random", "trials": 3}
    assert folder(sweep()) == folder(sweep(), "workers.count=3") == folder(sweep(concurrent=2))
    assert folder(sweep(**drawn)) == folder(sweep(**{**drawn, "trials": 9}))
    proposed = {"search": "optuna", "trials": 3, "concurrent": 1}
    different = [
        folder(sweep()),
        folder(sweep(), "optim.epochs=300"),
        folder(sweep(), "evaluation.predictions=2"),
        folder(sweep(space={**SPACE, "model.heads": [4]})),
        folder(sweep(space=dict(reversed(SPACE.items())))),
        folder(sweep(metrics={"FRDist": "min"})),
        folder(sweep(metrics={"FRDist": "min", "FRCorr": "max"})),
        folder(sweep(metrics={"FRCorr": "max", "FRDist": "min"})),
        folder(sweep(halving={"rungs": [4]})),
        folder(sweep(**drawn)),
        folder(sweep(**drawn, seed=1)),
        folder(sweep(**proposed)),
        folder(sweep(**{**proposed, "concurrent": 2})),
    ]
    assert len(set(different)) == len(different)


def test_a_sweep_stays_on_the_state_of_the_dataset_it_began_with(places: list[str], tmp_path: Path) -> None:
    first = trials(sweep(), places)
    OpenSweep(sweep(), places).pin()
    dataset(tmp_path / "shards", train=Split(), val=Split(appropriateness=File(file="val/other.npy", hash="1" * 32)))
    assert [trial.run for trial in trials(sweep(), places)] == [trial.run for trial in first]


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        ({"space": {"diffusion.shedule": ["cosine"]}}, [], r"no key diffusion.shedule; did you mean diffusion.schedule\?"),
        ({"space": {"diffusion.schedule": ["cosine", "sine"]}}, [], "diffusion.schedule = 'sine'"),
        ({"space": {"workers.zero": [1, 2]}}, [], "workers.zero=1 and workers.zero=2 would be the same run"),
        ({}, ["model.inter_depth=3"], "model.inter_depth is in the space"),
        ({"space": {"model.dropout": {"range": [0.5, 1.0]}}, "search": "random", "trials": 1}, [], "model.dropout = 1"),
        ({"space": {"diffusion.guidance": [1, 2]}, "search": "optuna", "trials": 9, "concurrent": 1}, [], "cannot be guided"),
    ],
)
def test_a_space_that_cannot_be_run_is_refused_before_anything_is_written(
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
    (tmp_path / "sweep.yaml").write_text("name: tried\nspace: {diffusion.schedule: [cosine, linear]}")
    store = OpenSweep(sweep(), places).store
    with Lease(store, "the first one"):
        second = call("tune", "--config", tmp_path / "sweep.yaml", *places)
        assert f"{store.url} is held by host " in second.stdout and "(the first one), which is at work there" in second.stdout
        assert [entry.key for entry in store.list()] == [LEASE]
        given_up = call("tune", "--config", tmp_path / "sweep.yaml", *places, "--give-up", "0", check=False)
        assert given_up.returncode == AGAIN and "trial 0 is not given up" in given_up.stdout
        assert [entry.key for entry in store.list()] == [LEASE]


def test_a_dataset_without_a_val_split_is_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "shards", train=Split(), val=Split())
    with pytest.raises(ValueError, match="trials cannot be compared on it"):
        trials(sweep(), [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nspace: {optim.lr: [1]}\nconcurent: 2", r"no key concurent; did you mean concurrent\?"),
        ("name: x\nspace: {optim.lr: [1]}\nmetrics: {FRCor: max}", r"no metric FRCor; did you mean FRCorr\?"),
        ("name: x\nspace: {optim.lr: []}", "optim.lr has no value to try"),
        ("name: x", "space: Field required"),
        ("name: x\nspace: {optim.lr: {range: [0.1, 0.2]}}", "optim.lr has a range, of which a grid cannot try every value"),
        ("name: x\nspace: {optim.lr: {range: [0.2, 0.1]}}", r"space.optim.lr.*must rise"),
        ("name: x\nspace: {optim.lr: [1]}\nsearch: random", "search: random goes on for ever: say how many trials"),
        ("name: x\nspace: {optim.lr: [1]}\nsearch: optuna\ntrials: 3", "search: optuna needs concurrent"),
        ("name: x\nspace: {optim.lr: [1]}\nhalving: {rungs: [4, 4]}", r"halving.rungs.*rise"),
        ("name: x\nspace: {a: {choice: [1], when: {b: 1}}}", "b does not stand above it in the space"),
        ("- x", "mapping"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Sweep.read(tmp_path / "sweep.yaml")


def test_the_experiment_is_a_file_beside_the_sweep_s_or_a_tree_and_overrides_lie_over_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {hidden: 64, latent: 16}")
    rest = "overrides: {model.latent: 32}\nspace: {optim.lr: [1.0e-4]}"
    for name, text in (("file", "base.yaml"), ("tree", "{model: {hidden: 64, latent: 16}}")):
        (tmp_path / f"{name}.yaml").write_text(f"name: x\nexperiment: {text}\n{rest}")
        model = Sweep.read(tmp_path / f"{name}.yaml").load().model
        assert (model.hidden, model.latent) == (64, 32)


def test_a_sweep_that_is_open_keeps_its_experiment_whatever_becomes_of_the_file(places: list[str], tmp_path: Path) -> None:
    (base := tmp_path / "base.yaml").write_text("model: {hidden: 64}")
    (tmp_path / "sweep.yaml").write_text("name: x\nexperiment: base.yaml\nspace: {optim.lr: [1.0e-4]}")
    opened = OpenSweep(Sweep.read(tmp_path / "sweep.yaml"), places)
    (before,) = opened.known_trials(opened.ledger)
    base.unlink()
    there = pickle.loads(pickle.dumps(opened))  # as a trial has it on its machine
    assert there.trial(0, before.point).experiment == before.experiment and before.experiment.model.hidden == 64
    with pytest.raises(ConfigError, match=r"no configuration file .*base\.yaml"):
        Sweep.read(tmp_path / "sweep.yaml")


def test_halving_that_could_stop_nothing_or_has_no_place_is_refused(tmp_path: Path) -> None:
    shards = {"train": Split(shards=table(64)), "val": Split(shards=table(8), appropriateness=File(file="val/matrix.npy", hash="0" * 32))}
    dataset(tmp_path / "shards", **shards)
    places = [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store", "optim.epochs=2", "optim.batch=16"]

    def check(*more: str, **halving: Any) -> None:
        opened = OpenSweep(sweep(halving={"rungs": [32, 240], **halving}), [*places, *more])
        opened.check(opened.known_trials(opened.ledger))

    check()
    with pytest.raises(ConfigError, match=r"halving on 6 clips of val could stop nothing.*it takes 7 clips"):
        check(clips=6)
    with pytest.raises(ConfigError, match=r"at 241 items, but trial diffusion.schedule=cosine,model.inter_depth=1 ends at 256"):
        check(rungs=[32, 241])
    with pytest.raises(ConfigError, match="has no stage diffusion"):
        opened = OpenSweep(sweep(space={"model.latent": [16, 32]}, halving={"rungs": [32]}), [*places, "model.family=trans-vae"])
        opened.check(opened.known_trials(opened.ledger))


def table(clips: int) -> ShardTable:
    """Shards of so many clips, as a manifest lists them."""
    return ShardTable(number=[0], clips=[clips], bytes=[0], tar="0" * 32, index="0" * 32)


def test_the_energy_score_can_be_searched_for(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{name: tried, space: {diffusion.steps: [10, 20]}, metrics: {EnergyScore: min}}")
    assert Sweep.read(tmp_path / "sweep.yaml").first_metric == "EnergyScore"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("diffusion.history", ["noisy", "clean"]),
        ("diffusion.normalisation", ["feature", "variance"]),
        ("model.space", ["latent", "attributes"]),
    ],
)
def test_halving_over_what_trials_are_asked_at_a_rung_is_refused(key: str, values: list[str]) -> None:
    space = SPACE | {key: values}
    assert key in sweep(space=space).space
    with pytest.raises(ValidationError, match=rf"{key} in space would have them asked other things"):
        sweep(space=space, halving={"rungs": [10]})
