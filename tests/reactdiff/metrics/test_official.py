"""The numbers: against the official code's, against plain definitions, and over any split into parts."""

import functools
import itertools
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reactdiff.metrics.arrays import load_arrays
from reactdiff.metrics.official import OFFICIAL, REPAIRED, merge, score, score_part
from reactdiff.metrics.partial import PartialScores
from reactdiff.metrics.synchrony import offsets

DATA = Path(__file__).parents[2] / "data" / "metrics"
EXPECTED = json.loads((DATA / "expected.json").read_text())
OFFICIAL_NAMES = {"FRCorr": "FRC", "FRDist": "FRD"}


@functools.cache
def fixture(name):
    arrays = load_arrays(DATA / f"{name}.npz")
    return arrays, score(**arrays)


def small(clips=4, predictions=3, frames=60, seed=0):
    """Smooth random reactions, some attributes constant, some switched on for a moment only."""
    rng = np.random.default_rng(seed)
    pred, target, speaker = (
        np.cumsum(rng.normal(size=shape), axis=-2).astype(np.float32) / 8
        for shape in ((clips, predictions, frames, 25), (clips, frames, 25), (clips, frames, 25))
    )
    target[:, :, 3] = 0.3
    pred[-1, 0, :, 3] = 0.3
    speaker[0, :, 20] = 0
    speaker[-1, :, 21] = 0
    speaker[-1, 10:12, 21] = 1
    appropriate = np.eye(clips, dtype=bool) | (rng.random((clips, clips)) < 0.5)
    return {"pred": pred, "target": target, "speaker": speaker, "appropriate": appropriate}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("metric", OFFICIAL)
def test_agrees_with_the_official_code(name, metric):
    assert fixture(name)[1].official[metric] == pytest.approx(EXPECTED[name][OFFICIAL_NAMES.get(metric, metric)], rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_FRDvs_of_merged_parts_is_exact_and_near_the_official_code_s_float32(name):
    """The official code sums 18 750 squares in float32, over pairs; sums that can be merged are float64."""
    arrays, _ = fixture(name)
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    merged = merge([score_part(arrays["pred"], arrays["target"], arrays["speaker"], near)]).official["FRDvs"]
    by_prediction = torch.from_numpy(arrays["pred"]).double().flatten(2).transpose(0, 1)
    groups, count, width = by_prediction.shape
    squares = torch.cdist(by_prediction, by_prediction, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    assert merged == pytest.approx((squares.sum() / (groups * count * (count - 1) * width)).item(), rel=1e-9)
    assert merged == pytest.approx(EXPECTED[name]["FRDvs"], rel=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_FRSyn_over_all_predictions_agrees_with_the_official_code(name):
    arrays, _ = fixture(name)
    pairs = zip(arrays["pred"].swapaxes(-1, -2), arrays["speaker"].swapaxes(-1, -2), strict=True)
    assert np.mean([offsets(pred, speaker).official for pred, speaker in pairs]) == pytest.approx(EXPECTED[name]["FRSyn_all"], rel=1e-6)


def test_repaired_metrics_do_not_depend_on_the_number_of_predictions_or_on_constant_attributes():
    scores = fixture("m_const")[1]
    assert tuple(scores.repaired) == REPAIRED
    assert scores.repaired["FRCorr_per_prediction"] == scores.official["FRCorr"] / 10
    assert scores.repaired["FRDist_per_prediction"] == scores.official["FRDist"] / 10
    assert scores.repaired["FRSyn_varying"] < scores.official["FRSyn"] == 49
    assert fixture("m_plain")[1].repaired["FRSyn_varying"] == pytest.approx(EXPECTED["m_plain"]["FRSyn_all"], rel=1e-6)


def test_every_metric_follows_its_definition():
    arrays = small()
    scores = score(**arrays).official
    clips, predictions = arrays["pred"].shape[:2]
    pred, target, speaker = (arrays[name].astype(np.float64) for name in ("pred", "target", "speaker"))
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    each = [(i, k) for i in range(clips) for k in range(predictions)]
    different = [(i, j) for i in range(clips) for j in range(clips) if i != j]
    assert scores["FRCorr"] == pytest.approx(sum(max(plain_ccc(target[j], pred[i, k]) for j in near[i]) for i, k in each) / clips)
    assert scores["FRDist"] == pytest.approx(sum(min(plain_distance(target[j], pred[i, k]) for j in near[i]) for i, k in each) / clips)
    between = [np.mean((pred[i, k] - pred[i, m]) ** 2) for i, k in each for m in range(predictions) if m != k]
    assert scores["FRDiv"] == pytest.approx(np.mean(between), rel=1e-6)
    assert scores["FRVar"] == pytest.approx(np.mean([pred[i, k, :, a].var(ddof=1) for i, k in each for a in range(25)]))
    assert scores["FRDvs"] == pytest.approx(np.mean([np.mean((pred[i] - pred[j]) ** 2) for i, j in different]))
    assert scores["FRSyn"] == np.mean([plain_offset(pred[i, 0], speaker[i]) for i in range(clips)])


def test_agreement_of_the_mean_and_without_the_mouth_follow_their_definitions():
    arrays = small()
    found = score(**arrays).extra
    clips, predictions = arrays["pred"].shape[:2]
    pred, target = (arrays[name].astype(np.float64) for name in ("pred", "target"))
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    means = [max(plain_ccc(target[j], pred[i].mean(axis=0)) for j in near[i]) for i in range(clips)]
    assert found["FRCorr_of_mean"] == pytest.approx(predictions * np.mean(means), rel=1e-5)
    face = np.delete(np.arange(25), [13, 14])
    best = [max(plain_ccc(target[j][:, face], pred[i, k][:, face]) for j in near[i]) for i in range(clips) for k in range(predictions)]
    assert found["FRCorr_no_mouth"] == pytest.approx(sum(best) / clips, rel=1e-5)


def plain_ccc(target, pred):
    values = []
    for t, p in zip(target.T, pred.T, strict=True):
        if np.ptp(t) == 0 or np.ptp(p) == 0:
            values.append(0.0)
        else:
            numerator = 2 * np.corrcoef(t, p)[0, 1] * t.std() * p.std()
            values.append(numerator / (t.var() + p.var() + (t.mean() - p.mean()) ** 2 + 1e-8))
    return np.mean(values)


def plain_distance(target, pred):
    groups = ((slice(0, 15), 15), (slice(15, 17), 1), (slice(17, 25), 8))
    return sum(plain_dtw(target[:, group], pred[:, group]) / divisor for group, divisor in groups)


def plain_dtw(x, y):
    cost = ((x[:, None] - y[None]) ** 2).sum(axis=-1).tolist()
    table = [[math.inf] * (len(y) + 1) for _ in range(len(x) + 1)]
    table[0][0] = 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            table[i + 1][j + 1] = cost[i][j] + min(table[i][j], table[i][j + 1], table[i + 1][j])
    return math.sqrt(table[-1][-1])


def plain_offset(pred, speaker):
    def correlation(x, y):
        return math.nan if np.ptp(x) == 0 or np.ptp(y) == 0 else np.corrcoef(x, y)[0, 1]

    frames = len(pred)
    curve = []
    for lag in range(-49, 50):
        x, y = (pred[lag:], speaker[: frames - lag]) if lag >= 0 else (pred[:lag], speaker[-lag:])
        curve.append(np.mean([correlation(x[:, a], y[:, a]) for a in range(25)]))
    return abs(49 - int(np.argmax(curve)))


@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, 5)), order=st.randoms(use_true_random=False), seed=st.integers(0, 3))
def test_any_split_into_parts_gives_the_same_scores(cuts, order, seed):
    arrays = small(clips=6, predictions=2, frames=52, seed=seed)
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    whole = merge([score_part(arrays["pred"], arrays["target"], arrays["speaker"], near, own=range(6))])
    edges = [0, *sorted(cuts), 6]
    parts = []
    for start, stop in itertools.pairwise(edges):
        own = range(start, stop)
        needed = {j: arrays["target"][j] for j in {int(j) for row in near[start:stop] for j in row} | set(own)}
        parts.append(score_part(arrays["pred"][start:stop], needed, arrays["speaker"][start:stop], near[start:stop], own))
    order.shuffle(parts)
    merged = merge(parts)
    assert merged.official == pytest.approx(whole.official, rel=1e-12, nan_ok=True)
    assert merged.repaired == pytest.approx(whole.repaired, rel=1e-12, nan_ok=True)
    assert merged.extra == pytest.approx(whole.extra, rel=1e-7, nan_ok=True)  # constant attributes: square roots of rounding


def assert_identical(one, other):
    arrays = other.to_arrays()
    for name, array in one.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_the_number_of_threads_changes_no_bit():
    arrays = small(clips=7)
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    one, three = (
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], near, own=range(7), threads=threads) for threads in (1, 3)
    )
    assert_identical(one, three)
    assert score(**arrays) == score(**arrays, threads=3)


def test_memory_mapped_arrays_are_scored_as_those_in_memory(tmp_path):
    arrays = small()
    for name in ("pred", "target", "speaker"):
        np.save(tmp_path / f"{name}.npy", arrays[name])
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("pred", "target", "speaker")}
    assert score(**arrays | mapped) == score(**arrays)


def test_a_part_comes_back_from_a_file_bit_for_bit(tmp_path):
    arrays = small(clips=2)
    part = score_part(arrays["pred"], arrays["target"], arrays["speaker"], [np.array([0]), np.array([0, 1])], own=[0, 1])
    np.savez(tmp_path / "part.npz", **part.to_arrays())
    with np.load(tmp_path / "part.npz", allow_pickle=False) as file:
        back = PartialScores.from_arrays(file)
    assert_identical(back, part)


def test_merging_parts_that_are_read_one_by_one_takes_no_more_memory_for_many_than_for_few():
    arrays = score_part(*(small(clips=1, predictions=20)[name] for name in ("pred", "target", "speaker")), [np.array([0])]).to_arrays()
    peaks = {}
    for count in (4, 4, 40):  # the first one imports
        tracemalloc.start()
        scores = merge(PartialScores.from_arrays({name: array.copy() for name, array in arrays.items()}) for _ in range(count))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert math.isfinite(scores.official["FRDvs"])
    assert peaks[40] - peaks[4] < arrays["mean"].nbytes


def test_nothing_to_merge_and_parts_of_different_evaluations_are_refused():
    with pytest.raises(ValueError, match="no parts to merge"):
        merge([])
    one, other = (
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], [np.array([0])])
        for arrays in (small(clips=1, predictions=k) for k in (1, 2))
    )
    with pytest.raises(ValueError, match=r"\(1, 60, 25\) cannot be merged with one of \(2, 60, 25\)"):
        merge([one, other])


def test_uniform_noise_has_the_diversity_and_variance_of_uniform_noise():
    rng = np.random.default_rng(0)
    pred = rng.random((6, 4, 100, 25), dtype=np.float32)
    other = rng.random((6, 100, 25), dtype=np.float32)
    official = score(pred, other, other, np.eye(6)).official
    assert official["FRDiv"] == pytest.approx(1 / 6, rel=0.02)
    assert official["FRDvs"] == pytest.approx(1 / 6, rel=0.02)
    assert official["FRVar"] == pytest.approx(1 / 12, rel=0.02)


def test_the_real_reaction_as_prediction_is_at_distance_zero():
    arrays = small()
    arrays["pred"] = np.repeat(arrays["target"][:, None], 2, axis=1)
    official = score(**arrays).official
    assert official["FRDist"] == 0
    assert official["FRDiv"] == 0


def test_a_constant_prediction_scores_nothing():
    arrays = small()
    arrays["pred"] = np.full_like(arrays["pred"], 0.3)
    scores = score(**arrays)
    assert [scores.official[name] for name in ("FRCorr", "FRVar", "FRDiv", "FRDvs", "FRSyn")] == [0, 0, 0, 0, 49]
    assert math.isnan(scores.repaired["FRSyn_varying"])


def test_a_constant_attribute_scores_zero_even_against_itself():
    arrays = small()
    arrays["target"][:, :, :5] = 0.3
    arrays["pred"] = arrays["target"][:, None]
    assert score(**arrays).official["FRCorr"] == pytest.approx(20 / 25, rel=1e-6)


def test_a_single_prediction_has_no_diversity_and_a_single_clip_no_spread():
    arrays = small(clips=1, predictions=1)
    scores = score(**arrays)
    assert scores.official["FRDiv"] == 0
    assert math.isnan(scores.official["FRDvs"])
    assert scores.to_dict()["official"]["FRDvs"] is None
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False)).keys() == {"official", "repaired", "extra", "intervals"}


def test_progress_counts_the_clips():
    told = []
    score(**small(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
