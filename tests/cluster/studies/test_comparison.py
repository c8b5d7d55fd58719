"""Comparisons up to where runs start, and the table of what they reach; tests/jobs/test_bench.py runs one."""

import re

import numpy as np
import pytest

from cluster.config.loading import ConfigError
from cluster.studies.comparison import Comparison, comparison_runs, markdown
from reactdiff.data.keyed import generator
from reactdiff.metrics.official import score_part
from reactdiff.metrics.partial import PartialScores

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


def test_a_wrong_key_and_rows_that_are_one_run_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="rows 'first' and 'longer' would be the same run"):
        comparison_runs(comparison(rows={"first": {}, "longer": {"optim.epochs.autoencoder": 300}}), [])
    with pytest.raises(ConfigError, match=r"model\.denoisr"):
        comparison_runs(comparison(rows={"odd": {"model.denoisr": "unet"}}), [])


def part(seed: int, noise: float) -> PartialScores:
    """Predictions that are the real reaction, with so much noise."""
    real = generator("real").random((6, 60, 25), dtype=np.float32)
    pred = real[:, None] + noise * generator("noise", seed).standard_normal((6, 2, 60, 25), dtype=np.float32)
    return score_part(pred, real, real, [np.array([clip]) for clip in range(6)], own=range(6))


def test_the_table_says_how_far_each_row_has_come_between_random_listener_and_oracle() -> None:
    parts = {"model": [part(1, 0.5), part(2, 0.5)], "random listener": [part(1, 3.0)] * 2, "oracle": [part(1, 0.1)] * 2}
    head, _, *lines = markdown(parts, {"model": (1234567, 0.5)}).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines}
    way = head.split(" | ").index("way to oracle")
    assert cells["random listener"][way] == "0%" and cells["oracle"][way] == "100%"
    assert 0 < int(cells["model"][way].removesuffix("%")) < 100
    low, high = map(float, cells["model"][2].split(" .. "))
    mean, spread = map(float, re.findall(r"[\d.]+", cells["model"][1]))
    assert low < mean < high and spread > 0 and "±" not in cells["oracle"][1], "the oracle is the same under both seeds here"
    assert "1,234,567" in cells["model"][-2]
