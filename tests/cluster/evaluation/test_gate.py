"""The rule of the gate, and the clips both models are judged on."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.config.loading import ConfigError
from cluster.data.manifest import File, Manifest, ShardTable, Split
from cluster.data.shards import ShardInfo, encode_npy
from cluster.evaluation.gate import GateError, Guard, Rule, frozen_clips, judge
from cluster.storage import Store, content_hash, open_store
from cluster.studies.retrain import Retraining
from tests.tiny import ROOT

RULE = Rule.model_validate({"margin": 0.1, "guards": {"FRDist": {"mode": "min", "percent": 10}}})
CHAMPION = {"FRCorr": 0.5, "FRDist": 100.0}


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


@pytest.mark.parametrize(
    ("correlation", "distance", "promoted", "because"),
    [
        (0.7, 100.0, True, "0.7000 against 0.5000, a gain of 0.2000"),
        (0.59, 100.0, False, "more than 0.1 is asked for"),
        (0.4, 100.0, False, "a gain of -0.1000"),
        (0.7, 109.0, True, ""),
        (0.7, 111.0, False, "FRDist is 111.0000 against 100.0000, worse by more than 10 %"),
        (0.7, None, False, "FRDist is undefined"),
        (None, 100.0, False, "FRCorr of the candidate is undefined"),
    ],
)
def test_a_candidate_must_exceed_the_margin_and_pass_every_guard(
    correlation: float | None, distance: float | None, promoted: bool, because: str
) -> None:
    better, why = judge(RULE, {"FRCorr": correlation, "FRDist": distance}, CHAMPION)
    assert better is promoted and because in why


def test_the_demo_s_rule_does_not_take_an_average_for_a_better_listener() -> None:
    """Scores of docs/science.md: the online oracle of chunks of 50, and the mean of two of its draws."""
    rule = Retraining.read(ROOT / "jobs" / "configs" / "retrain.yaml").rule
    oracle = {"FRCorr": 1.541, "FRDist": 88.6, "FRDiv": 0.185, "EnergyScore": 0.1919, "Roughness": 0.96}
    mean_of_two = {"FRCorr": 1.746, "FRDist": 79.7, "FRDiv": 0.093, "EnergyScore": 0.1973, "Roughness": 0.85}
    better, why = judge(rule, mean_of_two, oracle)
    assert not better and "EnergyScore is 0.1973 against 0.1919, worse by more than 1 %" in why
    assert not judge(rule, oracle | {"FRCorr": 1.6, "Roughness": 1.2}, oracle)[0], "what flickers is refused, too"
    assert judge(rule, oracle | {"FRCorr": 1.6}, oracle)[0]


def test_an_equal_candidate_does_not_replace_the_champion() -> None:
    assert not judge(Rule.model_validate({}), CHAMPION, CHAMPION)[0]


def test_where_less_is_better_the_lower_score_wins() -> None:
    rule = Rule.model_validate({"metric": "FRDist", "mode": "min"})
    assert judge(rule, {"FRDist": 99.0}, CHAMPION)[0] and not judge(rule, {"FRDist": 101.0}, CHAMPION)[0]


def test_without_a_champion_any_defined_score_is_enough() -> None:
    assert judge(RULE, CHAMPION, None)[0] and not judge(RULE, {"FRCorr": None}, None)[0]


def test_a_guard_of_a_negative_score_asks_for_percent_of_its_size() -> None:
    rule = Rule.model_validate({"guards": {"FRSyn": Guard(mode="max", percent=10)}})
    champion = {"FRCorr": 0.0, "FRSyn": -10.0}
    assert judge(rule, {"FRCorr": 1.0, "FRSyn": -10.9}, champion)[0] and not judge(rule, {"FRCorr": 1.0, "FRSyn": -11.1}, champion)[0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{metric: FRCor}", r"did you mean FRCorr\?"),
        ("{guards: {FRDis: {mode: min, percent: 1}}}", r"did you mean FRDist\?"),
        ("{margin: -1}", "rule.margin = -1"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_key(tmp_path: Path, rule: str, message: str) -> None:
    (tmp_path / "retrain.yaml").write_text(f"name: x\nrule: {rule}")
    with pytest.raises(ConfigError, match=message):
        Retraining.read(tmp_path / "retrain.yaml")


def state(store: Store, *clips: int, names: str = "ABCDEFGH", train: str = "XYZ", flip: bool = False) -> Manifest:
    """A dataset state with gate shards of so many clips each; one letter of `names` is seen in each of them."""
    n = sum(clips)
    matrix = np.eye(2 * n, dtype=bool)
    matrix[0, 1] = flip
    shards = ShardTable().plus({i: ShardInfo(count, 1000, f"{i:032d}", f"{i:032d}") for i, count in enumerate(clips)})
    gate = Split(shards=shards, appropriateness=_file(store, encode_npy(matrix)), subjects=_subjects(store, names[:n]))
    splits = {"train": Split(subjects=_subjects(store, train)), "gate": gate}
    return Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits=splits)


def _subjects(store: Store, names: str) -> File | None:
    return _file(store, json.dumps({"a": list(names), "b": list(names.lower())}).encode()) if names else None


def _file(store: Store, data: bytes) -> File:
    store.put(content_hash(data), data)
    return File(file=content_hash(data), hash=content_hash(data))


def test_a_grown_gate_judges_on_the_clips_the_champion_knew(folder: Store) -> None:
    assert frozen_clips(folder, state(folder, 4, 2), state(folder, 4), "train") == 4
    assert frozen_clips(folder, state(folder, 4, 2), None, "train") == 6


def test_another_gate_or_other_answers_are_refused(folder: Store) -> None:
    with pytest.raises(GateError, match="does not begin with the clips"):
        frozen_clips(folder, state(folder, 3, 2), state(folder, 4), "train")
    with pytest.raises(GateError, match="another appropriateness matrix"):
        frozen_clips(folder, state(folder, 4, flip=True), state(folder, 4), "train")


def test_a_person_who_is_trained_on_is_refused_by_name(folder: Store) -> None:
    with pytest.raises(GateError, match=r"2 persons are in both gate and train .* for example C"):
        frozen_clips(folder, state(folder, 4, train="XC"), None, "train")


def test_a_gate_that_cannot_judge_is_refused(folder: Store) -> None:
    with pytest.raises(GateError, match="does not tell who is seen in the clips of split train"):
        frozen_clips(folder, state(folder, 4, train=""), None, "train")
    without = state(folder, 4).model_copy(update={"splits": {"train": Split()}})
    with pytest.raises(GateError, match="has no split gate"):
        frozen_clips(folder, without, None, "train")
