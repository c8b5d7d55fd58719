"""The engine without a dataset: every kind of stage under ZeRO-3, and a step that is applied as a whole or not at all."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.training import engine as engine_module
from cluster.training.engine import LARGEST_NORM, Engine, EngineSettings, NonFinite, squared_norm
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import StreamSpec
from reactdiff.stage import Source, build, empty_batch, stages_over
from tests.cluster.support.poison import Poison
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


EVERY = [(zero, "fp32") for zero in range(4)] + [(zero, "bf16") for zero in (1, 2, 3)]
"""ZeRO stages and precisions."""

POISONS = (math.nan, math.inf, 1e30)
"""What the gradient of the first item is multiplied by; 1e30 is finite, but its square is not in fp32."""


class Toy(torch.nn.Module):
    """A stage with odd numbers of parameters, which no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = self.layers(batch["x"].to(self.layers[0].weight.dtype)).float().square().mean(1) * self.scale
        return Poison.apply(losses, batch["factor"])


def nine_items(factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Items of which the first one's gradient is multiplied."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    return {"x": x, "factor": torch.tensor([factor, *[1.0] * 8]), "weight": torch.ones(9)}


def norm_after_backward(engine: Engine, batch: dict[str, torch.Tensor], share: slice) -> tuple[float, float]:
    """Computes this rank's share of a step; returns loss and gradient norm of the whole."""
    mine, parts, loss = {name: value[share] for name, value in batch.items()}, engine.settings.micro_batches, 0.0
    for part in range(parts):
        cut = slice(part * len(mine["x"]) // parts, (part + 1) * len(mine["x"]) // parts)
        micro_loss = engine.forward({name: value[cut] for name, value in mine.items()}, len(batch["x"]))
        engine.backward(micro_loss)
        loss += float(micro_loss.detach())
    sums = torch.tensor([loss, engine.gradient_square()], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0]), math.sqrt(sums[1])


def state_of(engine: Engine) -> list[torch.Tensor]:
    """All that a step changes on this rank: weights, moments and averages, the weights of the next forward, Adam's count of steps."""
    kept = [view.clone() for fragment in engine.fragments() for view in fragment.tensors.values()]
    steps = [torch.as_tensor(float(state["step"])) for state in engine_module._inner(engine._engine).state.values()]
    return [*kept, *(p.detach() for p in engine.fill(Toy()).parameters()), *steps]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def toy_engine(zero: int, precision: str, micro_batches: int, clip: float) -> Engine:
    torch.manual_seed(0)
    return Engine(Toy(), EngineSettings(zero, precision, micro_batches, (0.9, 0.999), 5e-4, clip, 0.99), torch.device("cpu"))


def plain_norm() -> float:
    """Of the same gradient in plain torch, at the same weights."""
    torch.manual_seed(0)
    module, batch = Toy(), nine_items()
    (module(batch).sum() / 9).backward()
    return math.sqrt(squared_norm([p.grad for p in module.parameters() if p.grad is not None]))


def thrown_away(rank: int, ranks: int, cases: list[tuple[int, str, int]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What becomes of steps that are not applied; the last rank has nothing of any step, the others uneven shares."""
    first = rank * 9 // (ranks - 1)
    share, found = slice(first, 9 * (rank + 1) // (ranks - 1)) if rank < ranks - 1 else slice(0, 0), {}
    for zero, precision, parts in cases:
        engine, undisturbed = (toy_engine(zero, precision, parts, clip) for clip in (0.5, 0.5))
        of = found[zero, precision, parts] = {"plain": plain_norm()}
        of["norm"] = norm_after_backward(engine, nine_items(), share)[1]
        engine.step(1e-3)
        of["deepspeed"] = float(engine._engine.get_global_grad_norm() or 0)
        before = state_of(engine)
        of["poisoned"] = []
        for factor in POISONS:
            of["poisoned"].append(norm_after_backward(engine, nine_items(factor), share))
            engine.discard()
            of["left"] = [
                engine.gradient_square(),
                float(getattr(engine._engine.optimizer, "grad_partitions_flat_buffer", torch.zeros(1)).norm()),
            ]
        of["unchanged"] = equal(before, state_of(engine))
        norm_after_backward(engine, nine_items(), share)
        engine.step(1e-3)
        for _ in range(2):
            norm_after_backward(undisturbed, nine_items(), share)
            undisturbed.step(1e-3)
        of["same"], of["moved"] = equal(state_of(engine), state_of(undisturbed)), not equal(before, state_of(engine))
    before = state_of(engine)  # of ZeRO-3, the last of the cases
    norm_after_backward(engine, nine_items(math.nan), share)
    with pytest.raises(NonFinite, match="DeepSpeed skipped an update"):
        engine.step(1e-3)
    assert equal(before, state_of(engine))
    return found


MANY = [(zero, precision, 3) for zero, precision in EVERY]
ONE = [(zero, precision, 1) for zero, precision in EVERY]


@pytest.mark.starts
@pytest.mark.parametrize(("ranks", "cases"), [(2, [ONE[0], *MANY]), pytest.param(3, [*ONE, *MANY], marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_is_known_before_the_update_and_leaves_nothing_behind(
    ranks: int, cases: list[tuple[int, str, int]]
) -> None:
    for rank, found in enumerate(on_ranks(ranks, thrown_away, cases)):
        assert list(found) == cases
        for (zero, precision, parts), of in found.items():
            what, close = (rank, zero, precision, parts), 1e-5 if precision == "fp32" else 2e-2
            assert of["norm"] == pytest.approx(of["plain"], rel=close), what
            assert of["deepspeed"] == pytest.approx(of["norm"] if zero else 0, rel=1e-5), what
            assert all(math.isfinite(loss) and not norm <= LARGEST_NORM for loss, norm in of["poisoned"]), what
            assert of["left"] == [0, 0], what
            assert of["unchanged"] and of["moved"] and of["same"], what
