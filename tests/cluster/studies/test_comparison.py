"""Comparisons up to where runs start; tests/jobs/test_bench.py runs one."""

import pytest

from cluster.config.loading import ConfigError
from cluster.studies.comparison import Comparison, comparison_runs

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
    }
    found = {run.row: run for run in comparison_runs(comparison(rows=rows, seeds=[3]), [])}
    assert {row: run.trained.run.name == run.experiment.run.name for row, run in found.items()} == {
        **{"first": True, "dpm": False},
        **{"longer": True, "weighted": True, "on test": False},
    }
    assert found["dpm"].trained == found["first"].experiment and found["first"].drawn == found["longer"].drawn == ()
    assert found["on test"].trained == found["first"].experiment != found["on test"].experiment and found["on test"].drawn == ()
    assert found["dpm"].drawn == ('diffusion.sampler="dpm++"', "diffusion.sampling_steps=5")


def test_a_wrong_key_and_rows_that_are_one_run_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="row 'longer' would be the same run as one before it"):
        comparison_runs(comparison(rows={"first": {}, "longer": {"optim.epochs.autoencoder": 300}}), [])
    with pytest.raises(ConfigError, match="row 'again' would be the same run"):
        comparison_runs(comparison(rows={"first": {}, "again": {"telemetry.host": "127.0.0.2"}}), [])
    with pytest.raises(ConfigError, match=r"model\.denoisr"):
        comparison_runs(comparison(rows={"odd": {"model.denoisr": "unet"}}), [])
