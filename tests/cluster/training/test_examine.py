"""Items are looked at one by one: what is wrong with each, and that zeros, which stand for an item in quarantine, are never wrong."""

import math

import pytest
import torch
from torch import nn

from cluster.training.examine import examine
from reactdiff.config import Diffusion, Model
from reactdiff.stage import build, empty_batch, stages_over
from tests.cluster.support.poison import Poison
from tests.cluster.training.test_engine import CLIPS, FAMILIES, SMALL


class Scaled(nn.Linear):
    """A stage whose items have a loss and a gradient to be multiplied."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        nn.init.ones_(self.weight)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return Poison.apply(super().forward(batch["x"])[:, 0] * batch["loss"], batch["factor"])


def test_each_item_that_is_not_finite_is_told_with_which_of_the_two_and_those_of_weight_zero_are_left_out() -> None:
    one = torch.ones(7)
    batch = {"x": torch.ones(7, 2), "loss": one.clone(), "factor": one.clone(), "weight": one.clone()}
    batch["loss"][0], batch["loss"][1], batch["weight"][1] = -math.inf, math.nan, 0
    batch["factor"][2], batch["factor"][3], batch["factor"][4], batch["factor"][5] = math.nan, 1e30, 1e20, 1e18
    found = examine(Scaled(), batch, 1, 0)
    assert list(found) == [0, 2, 3, 4] and found[0] == "its loss is -inf" and found[2] == "its gradient has norm nan"
    assert list(examine(Scaled(), batch, 1000, 0)) == [0, 2, 3], "an item weighs what it weighs in its step"


@pytest.mark.parametrize("family", [{}, *FAMILIES.values()])
def test_items_of_zeros_are_finite_in_every_family_and_nothing_is_with_weights_that_are_not(family: dict) -> None:
    for kind in stages_over(CLIPS, Model(**{**SMALL, **family}), Diffusion(prediction="x0")).values():
        module, batch = build(kind, 0), empty_batch(kind, 1, "cpu") | {"weight": torch.ones(1)}
        assert examine(module, batch, 1, 0) == {}
        with torch.no_grad():
            next(module.parameters()).fill_(math.inf)
        assert list(examine(module, batch, 1, 0)) == [0]
