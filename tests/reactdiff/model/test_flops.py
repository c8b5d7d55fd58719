"""Operations of training, against a count by hand."""

import torch
from torch import Tensor, nn

from reactdiff.model.flops import training_flops


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.second(self.first(batch["x"]).tanh()).square().mean((1, 2))


def test_the_gradient_of_what_enters_the_first_layer_is_not_counted_for_nobody_takes_it() -> None:
    with torch.device("meta"):
        counted = training_flops(TwoLayers(), {"x": torch.empty(1, 11, 5)})
    first, second = 2 * 11 * 5 * 7, 2 * 11 * 7 * 3
    assert counted == 2 * first + 3 * second
