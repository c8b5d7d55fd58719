"""Scores in a file of the repository."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.config.schema import Experiment
from cluster.studies.kept_scores import ClipScores, RunScores, read_scores, scores_key, write_scores
from reactdiff.data.keyed import generator
from reactdiff.metrics.official import merge, score_part
from reactdiff.metrics.partial import PartialScores


def part(constant: bool = False) -> PartialScores:
    pred, real = generator("pred").random((5, 2, 60, 25), dtype=np.float32), generator("real").random((5, 60, 25), dtype=np.float32)
    return score_part(0 * pred if constant else pred, real, real, [np.array([clip]) for clip in range(5)])


def test_scores_come_back_from_a_file_as_they_were_kept(tmp_path: Path) -> None:
    scores, undefined = ClipScores.of(part()), ClipScores.of(part(constant=True))
    file = tmp_path / "science" / "compared.json"
    first = RunScores("first, seed 0", 12, 0.5, 2.5, {"model": scores, "oracle": scores})
    kept = {"a": first, "b": RunScores("second, seed 0", 13, 0.6, 2.6, {"model": undefined, "oracle": scores})}
    write_scores(file, kept)
    back = read_scores(file)
    assert list(back) == ["a", "b"]
    assert (back["b"].name, back["b"].parameters, back["b"].gflop, back["b"].tflop) == ("second, seed 0", 13, 0.6, 2.6)
    for key, run in kept.items():
        for row, one in run.rows.items():
            np.testing.assert_array_equal(back[key].rows[row].values, one.values)
            assert back[key].rows[row].predictions == 2
    assert len(json.loads(file.read_text())["values"]) == 2, "equal rows are kept once"
    assert back["a"].rows["model"].intervals() == scores.intervals()


def test_what_is_kept_has_the_metrics_of_what_was_scored() -> None:
    whole = merge([part()])
    found = ClipScores.of(part()).metrics()
    for name, value in (whole.official | whole.repaired | whole.extra).items():
        if name in found:
            assert found[name] == pytest.approx(value, rel=1e-3), name
    assert set(whole.intervals) == set(found)


def test_a_run_of_other_settings_training_or_data_has_other_scores() -> None:
    def key(manifest: str = "m", **branches: dict[str, object]) -> str:
        return scores_key(Experiment.model_validate({"data": {"url": "here"}} | branches), manifest)

    keys = [
        key(),
        key("other"),
        key(model={"hidden": 16}),
        key(optim={"epochs": 3}),
        key(evaluation={"predictions": 3}),
    ]
    assert len(set(keys)) == 5
    assert key(run={"store": "elsewhere"}, workers={"count": 3}) == key(), "where it runs does not matter"


def test_a_damaged_file_is_refused_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "none.json") == {}
    (tmp_path / "bad.json").write_text('{"runs": {}}')
    with pytest.raises(ValueError, match=r"bad.json holds no scores \(KeyError\('values'\)\): restore it, or delete it"):
        read_scores(tmp_path / "bad.json")
