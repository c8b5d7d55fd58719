import math

import pytest
import torch

from reactdiff.model.unet import Double, UNet, sinusoid
from tests.reactdiff.model.small import randomise


@pytest.mark.parametrize("length, multipliers", [(8, (1, 2, 2, 4)), (24, (1, 2, 3)), (7, (1,)), (32, (1, 1, 2, 2))])
def test_any_length_that_halves_between_levels_goes_through(length: int, multipliers: tuple[int, ...]) -> None:
    unet = randomise(UNet(50, length, 32, multipliers, 64, 2))
    output = unet(torch.randn(3, 50, length), torch.tensor([0, 7, 19]), torch.randn(3, 64))
    assert output.shape == (3, 50, length) and output.std() > 0


def test_a_length_that_does_not_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"model\.latent is 36.*4 levels of model\.multipliers.*multiple of 8"):
        UNet(50, 36, 32, (1, 2, 4, 8), 64, 2)


def test_attention_stands_at_every_level_but_the_deepest_and_in_the_middle() -> None:
    unet = UNet(50, 8, 32, (1, 2, 3), 64, 2)
    attending = [name.removesuffix(".attention") for name, _ in unet.named_modules() if name.endswith("attention")]
    assert attending == [f"down.{i}" for i in (0, 1, 3, 4)] + ["middle.0"] + [f"up.{i}" for i in (3, 4, 5, 6, 7, 8)]


def test_time_is_told_by_cosines_then_sines() -> None:
    expected = [math.cos(3), math.cos(3 * 10000**-0.5), math.sin(3), math.sin(3 * 10000**-0.5)]
    assert sinusoid(torch.tensor([3]), 4)[0].tolist() == pytest.approx(expected)


def test_doubling_repeats_each_feature() -> None:
    double, x = Double(2, 2, 3, padding=1), torch.randn(1, 2, 4)
    nearest = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(double(x), torch.nn.functional.conv1d(nearest, double.weight, double.bias, padding=1))
