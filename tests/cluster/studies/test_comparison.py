"""Comparisons up to where runs start; tests/jobs/test_bench.py runs one."""

import pytest

from cluster.config.loading import ConfigError
from cluster.config.spec import assignments
from cluster.studies.comparison import Comparison, comparison_runs, in_turn
from reactdiff.data.sample import SIMULATED
from reactdiff.stage import Source, flops_per_item, stages_over
from tests.tiny import ROOT

ROWS = {
    "first": {},
    "other denoiser": {"model.denoiser": "transformer"},
    "other process": {"diffusion.prediction": "v", "optim.lr.diffusion": 1e-3},
    "other encoder": {"model.intra": False},
    "other stage 1": {"optim.batch.autoencoder": 7},
    "warm": {"model.init_from": ["parent"]},
    "no stage 2": {"model.family": "trans-vae"},
}


def comparison(**keys: object) -> Comparison:
    return Comparison.model_validate({"name": "compared", "rows": ROWS, "seeds": [3, 4]} | keys)


def test_rows_take_the_autoencoder_of_the_first_that_has_the_same_under_the_same_seed() -> None:
    found = comparison_runs(comparison(), [])
    names = {(trial.row, trial.experiment.seed): trial.experiment.run.name for trial in found}
    assert len(set(names.values())) == len(found) == 14
    for trial in found:
        shares = trial.row in ("other denoiser", "other process")
        assert trial.experiment.run.autoencoder == (names["first", trial.experiment.seed] if shares else ""), trial.row


def test_a_comparison_is_the_same_runs_every_time_and_other_ones_with_other_settings() -> None:
    runs = [[run.experiment.run.name for run in comparison_runs(comparison(), overrides)] for overrides in ([], [], ["model.hidden=32"])]
    assert runs[0] == runs[1] and not set(runs[0]) & set(runs[2])


def test_rows_that_draw_in_another_way_are_drawn_from_the_run_of_the_first_that_trains_the_same() -> None:
    rows = {
        "first": {},
        "dpm": {"diffusion.sampler": "dpm++", "diffusion.sampling_steps": 5},
        "longer": {"diffusion.sampler": "dpm++", "optim.epochs.diffusion": 300},
        "weighted": {"diffusion.weighting": "min-snr"},
        "on test": {"evaluation.split": "test"},
        "long": {"diffusion.ema_length": 0.1},
        "guided": {"diffusion.autoguidance": 2.0, "diffusion.weak_progress": 100},
    }
    rows |= {row: {"diffusion.ema_every": 100, **keys} for row, keys in rows.items()}
    found = {run.row: run for run in comparison_runs(comparison(rows=rows, seeds=[3]), [])}
    assert {row: run.trained.run.name == run.experiment.run.name for row, run in found.items()} == {
        **{"first": True, "dpm": False},
        **{"longer": True, "weighted": True, "on test": False, "long": False, "guided": False},
    }
    assert found["dpm"].trained == found["first"].experiment and found["first"].drawn == found["longer"].drawn == ()
    assert found["on test"].trained == found["first"].experiment != found["on test"].experiment and found["on test"].drawn == ()
    assert found["guided"].trained == found["long"].trained == found["first"].experiment, "averages and weaker exports are made afterwards"
    assert found["guided"].drawn == ("diffusion.autoguidance=2.0", "diffusion.weak_progress=100")
    assert found["dpm"].drawn == ('diffusion.sampler="dpm++"', "diffusion.sampling_steps=5")


def test_long_runs_come_after_all_seeds_of_the_others_and_an_autoencoder_before_who_takes_it() -> None:
    rows = {"long": {"optim.epochs": 300, "optim.batch.autoencoder": 7}, "first": {}, "taker": {"diffusion.prediction": "v"}}
    every = comparison_runs(comparison(rows=rows), [])
    made = [(every[place].row, every[place].experiment.seed) for place in in_turn(every)]
    assert made == [("first", 3), ("taker", 3), ("first", 4), ("taker", 4), ("long", 3), ("long", 4)]
    assert every[in_turn(every)[1]].experiment.run.autoencoder == every[in_turn(every)[0]].experiment.run.name


def test_rows_on_other_data_are_runs_of_their_own_and_take_no_autoencoder_of_other_clips() -> None:
    few, fewer = {"data.url": "few"}, {"data.url": "fewer"}
    rows = {"first": {}, "few": few, "fewer": fewer, "fewer, v": fewer | ROWS["other process"]}
    found = {run.row: run.experiment for run in comparison_runs(comparison(rows=rows, seeds=[3]), [])}
    assert len({one.run.name for one in found.values()}) == 4
    assert found["first"].run.name == comparison_runs(comparison(rows={"first": {}}, seeds=[3]), [])[0].experiment.run.name
    taken = {row: one.run.autoencoder for row, one in found.items()}
    assert taken == {"first": "", "few": "", "fewer": "", "fewer, v": found["fewer"].run.name}


def test_a_wrong_key_and_rows_that_are_one_run_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="row 'longer' would be the same run as one before it"):
        comparison_runs(comparison(rows={"first": {}, "longer": {"optim.epochs.autoencoder": 300}}), [])
    with pytest.raises(ConfigError, match="row 'again' would be the same run"):
        comparison_runs(comparison(rows={"first": {}, "again": {"telemetry.host": "127.0.0.2"}}), [])
    with pytest.raises(ConfigError, match=r"model\.denoisr"):
        comparison_runs(comparison(rows={"odd": {"model.denoisr": "unet"}}), [])


@pytest.mark.parametrize(
    ("file", "row", "other"),
    [
        ("science/offline", "a token for each frame", "as it is"),
        ("science/online", "a token for each frame", "as it is"),
        ("science", "recipe, equal operations", "ReactDiff, x0"),
    ],
)
def test_rows_that_are_said_to_be_of_equal_operations_differ_by_less_than_ten_per_cent(file: str, row: str, other: str) -> None:
    asked = Comparison.read(ROOT / "jobs" / "configs" / f"{file}.yaml")

    def operations(name: str) -> float:
        """Of a row's training, by items of the demo's 400 clips."""
        experiment = asked.load(assignments(asked.rows[name]))
        stages = stages_over(Source(SIMULATED, 200), experiment.model, experiment.diffusion)
        return sum(flops_per_item(kind) * experiment.optim.epochs[stage] * 800 for stage, kind in stages.items())

    assert operations(row) == pytest.approx(operations(other), rel=0.1)
