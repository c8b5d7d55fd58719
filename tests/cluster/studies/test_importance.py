"""The share of the variance that lies between the values of a key."""

import numpy as np
import pytest

from cluster.studies.importance import importance
from cluster.studies.space import Dimension, Space

GRID = Space({"a": Dimension(choice=(0, 1, 2)), "b": Dimension(choice=(0, 1)), "c": Dimension(choice=("x", "y"))})


def test_shares_of_a_full_grid_are_those_of_its_main_effects() -> None:
    points = GRID.grid()
    shares = importance(GRID, points, [3.0 * point["a"] + 2.0 * point["b"] for point in points])
    of_a, of_b = 9 * np.var([0, 1, 2]), 4 * np.var([0, 1])
    assert shares == pytest.approx({"a": of_a / (of_a + of_b), "b": of_b / (of_a + of_b), "c": 0.0})


def test_what_lies_in_an_interaction_is_nobody_s_share() -> None:
    points = GRID.grid()
    shares = importance(GRID, points, [float(point["b"] == (point["c"] == "x")) for point in points])
    assert shares == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})


def test_a_range_is_cut_into_groups_and_a_key_is_judged_where_it_counts() -> None:
    space = Space(
        {
            "kind": Dimension(choice=("unet", "transformer")),
            "layers": Dimension(range=(1, 8), when={"kind": "transformer"}),
            "rate": Dimension(log_range=(1e-5, 1e-3)),
        }
    )
    chance = np.random.default_rng(0)
    points = [space.draw(lambda key: float(chance.random())) for _ in range(80)]
    shares = importance(space, points, [float(point.get("layers", 4)) for point in points])
    assert shares["layers"] > 0.8 and shares["rate"] < 0.2


def test_nothing_is_said_of_a_key_with_one_value_or_of_trials_that_are_all_alike() -> None:
    points = [{"a": 0, "b": 0, "c": "x"}, {"a": 0, "b": 1, "c": "x"}]
    assert set(importance(GRID, points, [1.0, 2.0])) == {"b"}
    assert importance(GRID, points, [1.0, 1.0]) == {} == importance(GRID, [], [])
