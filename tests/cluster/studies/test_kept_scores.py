"""Scores in a file of the repository."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest, ShardTable, Split
from cluster.data.shards import ShardInfo
from cluster.evaluation.rows import CUT, MODEL, rows_of
from cluster.studies.kept_scores import ClipScores, RunScores, read_scores, scores_key, write_scores
from reactdiff.data.keyed import generator
from reactdiff.metrics.official import merge, score_part
from reactdiff.metrics.partial import PER_CLIP, PartialScores


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
    columns = sum(len({tuple(column) for column in one.values.T.tolist()}) for one in (scores, undefined))
    assert len(json.loads(file.read_text())["columns"]) < columns, "equal columns, of whatever row, are kept once"
    assert back["a"].rows["model"].intervals() == scores.intervals()


def test_what_is_kept_has_the_metrics_of_what_was_scored() -> None:
    whole = merge([part()])
    found = ClipScores.of(part()).metrics()
    for name, value in (whole.official | whole.repaired | whole.extra).items():
        if name in found:
            assert found[name] == pytest.approx(value, rel=1e-3), name
    assert set(whole.intervals) == set(found)


def test_a_run_of_other_settings_training_or_data_has_other_scores() -> None:
    def key(hash_: str = "m", simulator: dict[str, int] | None = None, clips: int = 3, **branches: dict[str, object]) -> str:
        splits = {"test": Split(shards=ShardTable().plus({0: ShardInfo(clips, 1, "0" * 32, "0" * 32)}))}
        provenance = {} if simulator is None else {"simulator": simulator}
        manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits=splits, provenance=provenance)
        manifest._hash = hash_
        return scores_key(Experiment.model_validate({"data": {"url": "here"}} | branches), manifest)

    keys = [
        key(),
        key("other"),
        key(simulator={"seed": 0}),
        key(simulator={"seed": 1}),
        key(simulator={"seed": 1}, clips=4),
        key(model={"hidden": 16}),
        key(optim={"epochs": 3}),
        key(evaluation={"predictions": 3}),
        key(evaluation={"baselines": False}),
    ]
    assert len(set(keys)) == 9
    assert key(run={"store": "elsewhere"}, workers={"count": 3}) == key(), "where it runs does not matter"
    assert key("of another NumPy", {"seed": 0}) == key(simulator={"seed": 0}), "nor which bytes simulated clips were written as"


def test_a_row_that_is_drawn_otherwise_is_scored_again_and_runs_without_it_keep_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={})

    def keys() -> list[str]:
        return [scores_key(Experiment.model_validate({"evaluation": {"baselines": asked}}), manifest) for asked in (True, False)]

    revised = keys()
    monkeypatch.setattr("cluster.evaluation.plan.REVISIONS", {})
    before = keys()
    assert revised[0] != before[0] and revised[1] == before[1]


def test_rows_that_are_added_later_are_asked_for_and_not_silently_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={})
    experiment = Experiment.model_validate({"evaluation": {"baselines": False}})
    before = scores_key(experiment, manifest)
    assert list(rows_of(experiment, {})) == [MODEL, CUT], "of every model, whatever it denoises"
    monkeypatch.setattr("cluster.studies.kept_scores.rows_of", lambda *asked: rows_of(*asked) | {"later": None})
    assert scores_key(experiment, manifest) != before


def test_all_rows_of_the_widest_comparison_fit_into_a_file_of_1_mb(tmp_path: Path) -> None:
    """Sixty items; two rows of each of 63 runs and 60 of baselines. They share the real step and how many predictions vary."""
    rng, scored = generator("sizes"), part()
    shared = [PER_CLIP.index(name) for name in ("real_step", "varying")]
    values = 10.0 ** rng.integers(-2, 3, size=len(PER_CLIP)) * rng.random((126 + 60, 60, len(PER_CLIP)))
    values[:, :, shared] = values[0, :, shared].T
    rows = {str(number): ClipScores.of(replace(scored, values=one)) for number, one in enumerate(values)}
    write_scores(tmp_path / "wide.json", {"run": RunScores("wide", 1, 0.5, 2.5, rows)})
    assert (tmp_path / "wide.json").stat().st_size < 1_000_000


def test_a_damaged_file_is_refused_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "none.json") == {}
    (tmp_path / "bad.json").write_text('{"runs": {}}')
    with pytest.raises(ValueError, match=r"bad.json holds no scores \(KeyError\('columns'\)\): restore it, or delete it"):
        read_scores(tmp_path / "bad.json")
