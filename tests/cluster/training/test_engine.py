"""Every kind of stage under DeepSpeed, without a dataset: what ZeRO-3 shards is whole where it is used."""

from typing import Any

import pytest
import torch

from cluster.training.engine import Engine, EngineSettings
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import Source, build, empty_batch, stages_over
from tests.cluster.support.ranks import on_ranks

CLIPS = Source((StreamSpec("au", "facial", 15), StreamSpec("mfcc", "acoustic", 26)), 100)
SMALL = {"facial": ("au",), "acoustic": ("mfcc",), "hidden": 16, "latent": 8, "channels": 32, "multipliers": (1, 1), "condition": 64}
FAMILIES = {
    "transformer": {"denoiser": "transformer", "online": True, "width": 16, "layers": 2},
    "perfrdiff": {"family": "perfrdiff", "online": True, "width": 16, "layers": 2, "dropout": 0.0},
    "trans-vae": {"family": "trans-vae", "width": 16, "layers": 2, "dropout": 0.0},
    "ablated": {"intra": False, "inter": False, "bounded": True},
}


def losses(rank: int, ranks: int, zero: int) -> dict[str, list[float]]:
    """What `learn` gives for every family."""
    return {name: learn(rank, family, zero) for name, family in FAMILIES.items()}


def learn(rank: int, family: dict[str, Any], zero: int) -> list[float]:
    """Losses of three steps of every stage on noise; a rank's share of a step is one item of two, and the second rank's of step 1 none."""
    kinds, found = stages_over(CLIPS, Model(**{**SMALL, **family}), Diffusion(prediction="x0")), []
    for kind in kinds.values():
        module = build(kind, 0)
        engine = Engine(module, EngineSettings(zero, "fp32", 1, (0.9, 0.999), 5e-4, 0.0, 0.99), torch.device("cpu"))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batch = {name: torch.randn(each.shape, generator=generator) for name, each in empty_batch(kind, 2, "cpu").items()}
            batch |= {"times": torch.tensor([[3, 7], [11, 19]])} if "times" in batch else {}
            share = slice(0, 0) if step == 1 and rank == 1 else slice(rank, rank + 1)
            torch.manual_seed(step)  # PerFRDiff hides tokens by chance
            loss = engine.forward({name: each[share] for name, each in batch.items()} | {"weight": torch.ones(2)[share]}, 2)
            engine.backward(loss)
            engine.step(1e-3)
            found.append(float(loss.detach()))
    return found


@pytest.mark.starts
def test_zero_3_learns_what_zero_1_learns() -> None:
    one, three = (on_ranks(2, losses, zero) for zero in (1, 3))
    for family in FAMILIES:
        for rank in range(2):
            assert one[rank][family] == pytest.approx(three[rank][family], rel=1e-5), (family, rank)
        assert one[0][family][0] > 0 and one[1][family][1] == 0, "the second rank had nothing in the second step"
