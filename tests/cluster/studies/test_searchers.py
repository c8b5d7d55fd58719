"""Suggestions are pure functions of seed, number and what was told, and a searcher that is told something learns from it."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cluster.studies.searchers import TRIES, Told, best_of, defined, suggest
from cluster.studies.space import Dimension, Point, Space
from reactdiff.data.keyed import generator
from tests.tiny import ROOT

SPACE = Space(
    {
        key: Dimension.model_validate(value)
        for key, value in {
            "diffusion.schedule": {"choice": ["cosine", "linear", "karras"]},
            "model.facial": {"choice": [["au"], ["au", "va"]]},
            "model.layers": {"range": [1, 8], "when": {"diffusion.schedule": ["cosine", "linear"]}},
            "optim.lr": {"log_range": [1e-5, 1e-2]},
        }.items()
    }
)
KINDS = {"diffusion.schedule": str, "model.facial": list, "model.layers": int, "optim.lr": float}


def anything(_: Point) -> bool:
    """Whether a point can be tried."""
    return True


def not_among(taken: list[Point]) -> Callable[[Point], bool]:
    """Whether a point is none of these, as they are when it is asked."""
    return lambda point: point not in taken


def told_of(count: int, modes: int = 1) -> list[Told]:
    """Trials in which cosine, and a rate near 1e-3, are best; some were stopped and some failed."""
    told: list[Told] = []
    for number in range(count):
        point = suggest("random", SPACE, ["min"], 9, number, [], anything)
        assert point is not None
        value = (point["diffusion.schedule"] != "cosine") + abs(point["optim.lr"] - 1e-3) * 1e3
        if number % 5 == 3:
            told.append(Told(point, None, {10: value}))
        else:
            told.append(Told(point, None if number % 7 == 6 else [value, -value][:modes]))
    return told


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_a_suggestion_is_a_point_of_the_space_with_the_types_of_its_keys(method: Any) -> None:
    for number in range(20):
        point = suggest(method, SPACE, ["min"], 0, number, told_of(number), anything)
        assert point is not None and ("model.layers" in point) == (point["diffusion.schedule"] != "karras")
        assert {key: type(value) for key, value in point.items()} == {key: KINDS[key] for key in point}


@pytest.mark.starts
@pytest.mark.parametrize("modes", [["min"], ["min", "max"]])
def test_the_same_question_has_the_same_answer_in_another_process(modes: list[Any]) -> None:
    call = f"suggest('optuna', SPACE, {modes}, 3, 14, told_of(14, {len(modes)}), anything)"
    script = f"from tests.cluster.studies.test_searchers import *; print({call})"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    here = [str(suggest("optuna", SPACE, modes, 3, 14, told_of(14, len(modes)), anything)) for _ in range(2)]
    assert here == [other.stdout.strip()] * 2


def test_another_number_another_seed_or_more_that_is_told_give_another_point() -> None:
    asked = ((0, 20, 20), (0, 21, 20), (1, 20, 20))
    points = [suggest("optuna", SPACE, ["min"], seed, number, told_of(told), anything) for seed, number, told in asked]
    assert len({str(point) for point in points}) == 3


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_optuna_learns_from_values_and_from_the_errors_of_stopped_trials(mode: Any, sign: int) -> None:
    for told in (
        [Told(one.point, one.values and [sign * one.values[0]], one.errors) for one in told_of(60)],
        [Told(one.point, None, one.errors or {10: one.values[0]}) for one in told_of(60) if one.values or one.errors],
    ):
        points = [suggest("optuna", SPACE, [mode], 0, number, told, anything) for number in range(60, 90)]
        assert sum(point is not None and point["diffusion.schedule"] == "cosine" for point in points) > 18, "a third, at random"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_optuna_keeps_away_from_what_failed(mode: Any) -> None:
    """Karras always fails, with errors at a rung or without any; the others are all alike."""
    random = [suggest("random", SPACE, [mode], 9, number, [], anything) for number in range(40)]
    for errors in ({}, {10: 1.0}):
        told = [Told(point, None, errors) if point["diffusion.schedule"] == "karras" else Told(point, [0.5]) for point in random if point]
        points = [suggest("optuna", SPACE, [mode], 0, number, told, anything) for number in range(40, 70)]
        assert sum(point is not None and point["diffusion.schedule"] == "karras" for point in points) < 4, "a third, at random"


def test_no_point_is_tried_twice_and_a_space_that_is_exhausted_says_so() -> None:
    small = Space({"a": Dimension(choice=(1, 2)), "b": Dimension(choice=("x", "y", "z"))})
    for method in ("grid", "random", "optuna"):
        taken: list[Point] = []
        while (point := suggest(method, small, ["max"], 0, len(taken), [], not_among(taken))) is not None:
            taken.append(point)
        assert sorted(map(str, taken)) == sorted(map(str, small.grid())), method


def test_where_optuna_proposes_the_same_again_and_again_the_points_that_are_left_are_tried() -> None:
    """Ten good points of twelve values: what it proposes is hardly ever one of the two that were not tried."""
    small = Space({"a": Dimension(choice=tuple(range(12)))})
    taken: list[Point] = [{"a": value} for value in range(10)]
    told = [Told({"a": value % 10}, [float(value % 10)]) for value in range(200)]
    found = []
    for number in (200, 201, 202):
        found.append(suggest("optuna", small, ["min"], 0, number, told, not_among(taken)))
        taken += [point for point in found if point]
    assert sorted(map(str, found)) == ["None", "{'a': 10}", "{'a': 11}"]


def test_the_points_of_a_large_space_are_not_listed_to_find_one() -> None:
    large = Space({f"k{number}": Dimension(choice=tuple(range(10))) for number in range(30)})
    drawn = iter([False] * TRIES + [False, False, True])
    point = suggest("random", large, ["min"], 0, 0, [], lambda _: next(drawn))
    assert point is not None and list(point.values()) == [0] * 29 + [2]


def test_random_points_are_spread_over_the_space() -> None:
    points = [suggest("random", SPACE, ["min"], 0, number, [], anything) for number in range(300)]
    counts = [sum(point is not None and point["diffusion.schedule"] == name for point in points) for name in ("cosine", "linear", "karras")]
    assert all(70 < count < 130 for count in counts)
    assert generator("sweep", 0, 0, 0, "optim.lr").random() != generator("sweep", 0, 0, 0, "model.layers").random()


def test_scores_are_told_only_where_all_metrics_are_defined() -> None:
    scores = {"FRCorr": 0.5, "FRDist": None, "FRDiv": float("nan")}
    assert defined(scores, ["FRCorr"]) == [0.5]
    assert [defined(scores, ["FRCorr", other]) for other in ("FRDist", "FRDiv", "FRVar")] == [None] * 3
    assert defined(None, ["FRCorr"]) is None


def test_the_best_is_the_first_of_equals_and_has_a_finite_value() -> None:
    values = {0: None, 1: 2.0, 2: math.nan, 3: 5.0, 4: 5.0, 5: math.inf}
    assert (best_of(values, "max"), best_of(values, "min")) == (3, 1)
    assert best_of({0: None, 1: math.nan}, "max") is None
