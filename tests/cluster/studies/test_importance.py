"""The share of the variance that lies between the values of a key."""

import numpy as np
import pytest

from cluster.studies.importance import importance
from cluster.studies.space import Dimension, Space

GRID = Space({"a": Dimension(choice=(0, 1, 2)), "b": Dimension(choice=(0, 1)), "c": Dimension(choice=("x", "y"))})


def test_shares_of_a_full_grid_are_those_of_its_main_effects_less_what_chance_would_give() -> None:
    points = GRID.grid()
    shares = importance(GRID, points, [3.0 * point["a"] + 2.0 * point["b"] for point in points])
    of_a, of_b = 9 * np.var([0, 1, 2]), 4 * np.var([0, 1])
    left_by_a, left_by_b = of_b / (of_a + of_b), of_a / (of_a + of_b)
    assert shares == pytest.approx({"a": 1 - left_by_a * 11 / 9, "b": 1 - left_by_b * 11 / 10, "c": 0.0})


def test_of_pure_noise_hardly_anything_is_said_to_matter() -> None:
    space = Space({key: Dimension(range=(0.0, 1.0)) for key in "abc"})
    chance, shares = np.random.default_rng(0), list[float]()
    for _ in range(200):
        points = [space.draw(lambda key: float(chance.random())) for _ in range(8)]
        shares += importance(space, points, chance.normal(size=8).tolist()).values()
    assert len(shares) == 600 and np.mean(shares) < 0.1


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
    points = [{"a": 0, "b": 0, "c": "x"}, {"a": 0, "b": 1, "c": "x"}, {"a": 0, "b": 1, "c": "x"}]
    assert set(importance(GRID, points, [1.0, 2.0, 2.5])) == {"b"}
    assert importance(GRID, points[:2], [1.0, 2.0]) == {}, "nothing tells it from chance"
    assert importance(GRID, points, [1.0, 1.0, 1.0]) == {} == importance(GRID, [], [])
