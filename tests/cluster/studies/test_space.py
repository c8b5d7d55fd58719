"""A space is checked where it is read, and its points are functions of what is drawn."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.studies.space import Dimension, Space, text_of


def space(**dimensions: Any) -> Space:
    return Space({key.replace("__", "."): Dimension.model_validate(value) for key, value in dimensions.items()})


CONDITIONAL = {
    "model__denoiser": {"choice": ["unet", "transformer"]},
    "model__layers": {"choice": [2, 4], "when": {"model.denoiser": "transformer"}},
    "model__blocks": {"choice": [1, 2, 3], "when": {"model.denoiser": ["unet"]}},
}


def test_a_grid_is_every_combination_the_last_key_changing_fastest() -> None:
    points = space(a={"choice": [1, 2]}, b={"choice": ["x", "y", "z"]}).grid()
    assert [tuple(point.values()) for point in points] == list(itertools.product([1, 2], "xyz"))


def test_a_key_whose_condition_does_not_hold_is_not_in_the_point_and_makes_no_twins() -> None:
    points = space(**CONDITIONAL).grid()
    assert [text_of(point) for point in points] == [
        *(f"model.denoiser=unet,model.blocks={blocks}" for blocks in (1, 2, 3)),
        *(f"model.denoiser=transformer,model.layers={layers}" for layers in (2, 4)),
    ]


def test_a_condition_on_a_key_that_does_not_count_does_not_hold() -> None:
    chain = space(**CONDITIONAL, more={"choice": [True, False], "when": {"model.layers": 4}})
    assert [point["model.layers"] for point in chain.grid() if "more" in point] == [4, 4]


def test_the_corners_have_each_value_and_each_end_under_its_conditions() -> None:
    corners = list(space(**CONDITIONAL, optim__lr={"log_range": [1e-5, 1e-3]}).corners())
    assert {(key, value) for point in corners for key, value in point.items()} >= {
        *(("model.denoiser", name) for name in ("unet", "transformer")),
        *(("model.layers", layers) for layers in (2, 4)),
        *(("model.blocks", blocks) for blocks in (1, 2, 3)),
        *(("optim.lr", rate) for rate in (1e-5, 1e-3)),
    }


@pytest.mark.parametrize(
    ("dimension", "low", "middle", "high"),
    [
        ({"range": [2, 5]}, 2, 4, 5),
        ({"range": [0.0, 1]}, 0.0, 0.5, 1.0),
        ({"log_range": [1e-4, 1e-2]}, 1e-4, 1e-3, 1e-2),
        ({"log_range": [1, 99]}, 1, 10, 99),
        ({"choice": ["a", "b", "c"]}, "a", "b", "c"),
        ({"log_range": ["1e-4", "1e-2"]}, 1e-4, 1e-3, 1e-2),  # YAML 1.1 reads 1e-4 as text
    ],
)
def test_a_draw_goes_from_the_first_value_to_the_last(dimension: dict[str, Any], low: Any, middle: Any, high: Any) -> None:
    one = Dimension.model_validate(dimension)
    drawn = [one.at(share) for share in (0.0, 0.5, np.nextafter(1.0, 0.0))]
    assert drawn == pytest.approx([low, middle, high]) if isinstance(low, float) else drawn == [low, middle, high]
    assert {type(value) for value in drawn} == {type(low)}


def test_whole_numbers_of_a_range_are_equally_likely() -> None:
    one = Dimension.model_validate({"range": [3, 6]})
    assert [sum(one.at(share) == value for share in np.arange(0, 1, 1 / 400)) for value in (3, 4, 5, 6)] == [100] * 4


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    one = Dimension.model_validate({"log_range": [1e-6, 1e-2]})
    assert math.log10(one.at(0.25)) == pytest.approx(-5)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({}, "give one of choice, range and log_range, not none"),
        ({"choice": [1], "range": [1, 2]}, "not choice and range"),
        ({"range": [2, 2]}, r"range is \[2, 2\], but must rise"),
        ({"log_range": [0, 1]}, "must rise and begin above 0"),
        ({"choice": []}, "at least 1 item"),
        ({"chioce": [1]}, "Extra inputs"),
    ],
)
def test_values_that_make_no_dimension_are_refused(dimension: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dimension.model_validate(dimension)


def test_conditions_that_exclude_each_other_are_refused_and_others_hold_together() -> None:
    above = {"a": {"choice": [1, 2, 3]}, "b": {"choice": ["x", "y"], "when": {"a": [2, 3]}}}
    corners = list(space(**above, c={"choice": [5, 6], "when": {"a": [1, 2], "b": "y"}}).corners())
    assert corners[-2:] == [{"a": 2, "b": "y", "c": value} for value in (5, 6)]
    with pytest.raises(ValueError, match="c never counts: the keys of its conditions count for other values of a than it does"):
        space(**above, c={"choice": [5, 6], "when": {"a": 1, "b": "y"}})


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({"model.other": 1}, "model.other does not stand above it"),
        ({"model.layers": 2}, "model.layers does not stand above it"),
        ({"model.denoiser": "gru"}, "counts when model.denoiser is gru, but 'gru' is none of its values"),
        ({"optim.lr": 0.5}, "that is a range, and conditions are on choices"),
    ],
)
def test_a_condition_that_can_never_hold_is_refused(when: dict[str, Any], message: str) -> None:
    above = {"optim__lr": {"range": [0.1, 1]}, "model__denoiser": {"choice": ["unet", "transformer"]}}
    with pytest.raises(ValueError, match=message):
        space(**above, model__layers={"range": [1, 8], "when": when})


def test_a_range_is_no_part_of_a_grid() -> None:
    with pytest.raises(ValueError, match=r"optim\.lr has a range, of which a grid cannot try every value"):
        space(optim__lr={"range": [0.1, 1]}).grid()
