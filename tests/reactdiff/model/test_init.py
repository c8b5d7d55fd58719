import pytest
import torch
from torch import nn

from reactdiff.config import Diffusion
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.init import initialise
from reactdiff.model.latent_diffusion import LatentDiffusion
from tests.reactdiff.model.small import MODEL, STREAMS


def models() -> list[nn.Module]:
    return [Autoencoder(MODEL, STREAMS), LatentDiffusion(MODEL, Diffusion(), 50)]


class Pair(nn.Module):
    def __init__(self, names: str):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 4))


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, second = Pair("ab"), Pair("ba")
    torch.manual_seed(1)
    initialise(first, 0)
    torch.manual_seed(2)
    initialise(second, 0)
    assert all(torch.equal(parameter, second.get_parameter(name)) for name, parameter in first.named_parameters())
    assert not torch.equal(first.a.weight, first.b.weight)
    initialise(second, 1)
    assert not torch.equal(first.a.weight, second.a.weight)


@pytest.mark.parametrize("number", [0, 1])
def test_every_parameter_has_the_spread_of_pytorchs_default(number: int) -> None:
    torch.manual_seed(0)
    ours, default = models()[number], models()[number]
    initialise(ours, 0)
    for name, parameter in ours.named_parameters():
        parameter, theirs = parameter.detach(), default.get_parameter(name).detach()
        if not theirs.any() or (theirs == 1).all():
            assert torch.equal(parameter, theirs), name
        elif theirs.numel() > 100:
            assert float(parameter.std() / theirs.std()) == pytest.approx(1, abs=0.25), name
            assert float(parameter.abs().max() / theirs.abs().max()) == pytest.approx(1, abs=0.1), name
            assert not torch.equal(parameter, theirs), name


def test_a_layer_without_a_rule_is_named() -> None:
    with pytest.raises(TypeError, match=r"no rule for 1\.weight of Bilinear"):
        initialise(nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2)), 0)
