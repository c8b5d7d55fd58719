"""The engine without a dataset: every kind of stage under ZeRO-3, and a step that is applied as a whole or not at all."""

import math
import os
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import cuda_accelerator, set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from cluster.training import zero as zero_module
from cluster.training.engine import Engine
from cluster.training.gradient import LARGEST_NORM, finite, squared_norm
from cluster.training.settings import EngineSettings, engine_settings
from cluster.training.zero import ALIGNED, BUCKET
from reactdiff.averages import LENGTHS
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import StreamSpec
from reactdiff.model.init import Weights, initial_weights
from reactdiff.stage import Source, build_without_memory, empty_batch, stages_over
from tests.cluster.support.poison import Poison
from tests.cluster.support.ranks import on_ranks
from tests.tiny import tiny

CLIPS = Source((StreamSpec("au", "facial", 15), StreamSpec("mfcc", "acoustic", 26)), 100)
SMALL = {"facial": ("au",), "acoustic": ("mfcc",), "hidden": 16, "latent": 8, "channels": 32, "multipliers": (1, 1), "condition": 64}
FAMILIES = {
    "transformer": {"denoiser": "transformer", "online": True, "width": 16, "layers": 2},
    "perfrdiff": {"family": "perfrdiff", "online": True, "width": 16, "layers": 2, "dropout": 0.0},
    "trans-vae": {"family": "trans-vae", "width": 16, "layers": 2, "dropout": 0.0},
    "belfusion": {"family": "belfusion", "latent": 2, "width": 16, "layers": 2},
    "ablated": {"intra": False, "inter": False, "bounded": True},
}


def losses(rank: int, ranks: int, zero: int, again: bool) -> dict[str, list[float]]:
    """What `learn` gives for every family."""
    return {name: learn(rank, family, zero, again) for name, family in FAMILIES.items()}


def learn(rank: int, family: dict[str, Any], zero: int, again: bool, compile_for: int = 0) -> list[float]:
    """Losses of three steps of every stage on noise; a rank's share of a step is one item of two, and the second rank's of step 1 none.

    Activations are kept, or computed again. Where it is compiled, for so many items, each loss is followed by how many graphs there are.
    """
    kinds, found = stages_over(CLIPS, Model(**{**SMALL, **family}), Diffusion(prediction="x0")), []
    for kind in kinds.values():
        module = build_without_memory(kind)
        settings = EngineSettings(zero, "fp32", 1, (0.9, 0.999), 5e-4, 0.0, 0.99, again, compile_for, "none", ())
        engine = Engine(module, initial_weights(module, 0), settings, torch.device("cpu"))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batch = {name: torch.randn(each.shape, generator=generator) for name, each in empty_batch(kind, 2, "cpu").items()}
            batch |= {"times": torch.tensor([[3, 7], [11, 19]])} if "times" in batch else {}
            share = slice(0, 0) if step == 1 and rank == 1 else slice(rank, rank + 1)
            torch.manual_seed(step)  # PerFRDiff hides tokens by chance
            loss = engine.forward({name: each[share] for name, each in batch.items()} | {"weight": torch.ones(2)[share]}, 2)
            engine.backward(loss)
            engine.step(1e-3, loss.detach(), engine.gradient_square())
            engine.average(step + 1)
            found += [float(loss.detach())] + [torch._dynamo.utils.counters["stats"]["unique_graphs"]] * bool(compile_for)
    return found


def test_a_micro_batch_of_0_means_no_more_items_at_once_than_at_the_largest_size(tmp_path: Path) -> None:
    def forwards(*settings: str) -> dict[int, int]:
        experiment = tiny(tmp_path, tmp_path, "optim.batch=6", *settings)
        return {ranks: engine_settings(experiment, "autoencoder", ranks).micro_batches for ranks in (3, 2, 1)}

    assert forwards("workers.count=[1,3]") == {3: 1, 2: 2, 1: 3}, "2 items at once, as on 3 ranks"
    assert forwards("workers.count=3") == {3: 1, 2: 1, 1: 1}
    assert forwards("workers.count=[1,3]", "workers.micro_batch=1") == {3: 2, 2: 3, 1: 6}


@pytest.mark.starts
def test_zero_3_learns_what_zero_1_learns_and_activations_that_are_computed_again_change_no_bit() -> None:
    one, three = (on_ranks(2, losses, zero, False) for zero in (1, 3))
    assert on_ranks(2, losses, 1, True) == one and on_ranks(2, losses, 3, True) == three
    for family in FAMILIES:
        for rank in range(2):
            assert one[rank][family] == pytest.approx(three[rank][family], rel=1e-5), (family, rank)
        assert one[0][family][0] > 0 and one[1][family][1] == 0, "the second rank had nothing in the second step"


def compiled(rank: int, ranks: int, zero: int, dropout: float, items: int) -> list[float]:
    """What `learn` gives of a model with so much dropout."""
    return learn(rank, {"denoiser": "transformer", "width": 16, "layers": 2, "dropout": dropout}, zero, False, items)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "items", "dropout"), [(0, 1, 0.1), (2, 3, 0.0)])  # of a share that is filled, dropout draws other masks
def test_a_compiled_step_has_the_same_bits_twice_is_compiled_once_and_learns_what_an_uncompiled_one_learns(
    zero: int, items: int, dropout: float
) -> None:
    plain, once, again = (on_ranks(2, compiled, zero, dropout, number) for number in (0, items, items))
    assert once == again
    for found, expected in zip(once, plain, strict=True):
        assert found[::2] == pytest.approx(expected, rel=1e-4)
        first, second = set(found[1:6:2]), set(found[7::2])
        assert len(first) == len(second) == 1 and 0 < min(first) < min(second), "an empty share, or one of fewer items, is no other graph"


@pytest.mark.parametrize(("device", "ranks", "bucket"), [("cuda", 2, 80 * 10**6), ("cuda", 1, BUCKET), ("cpu", 2, BUCKET)])
def test_what_is_reduced_beside_the_backward_has_room_for_the_largest_parameter(device: str, ranks: int, bucket: int) -> None:
    settings = EngineSettings(2, "bf16", 1, (0.9, 0.999), 5e-4, 0.0, 0.99, False, 0, "none", ())
    with zero_module.last_of(ranks):
        told = zero_module.deepspeed_config(settings, [1000, 80 * 10**6], torch.device(device))["zero_optimization"]
    assert told["overlap_comm"] == (bucket > BUCKET)
    assert bucket <= told["reduce_bucket_size"] < bucket + ALIGNED and told["reduce_bucket_size"] % ALIGNED == 0


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


def advance(engine: Engine, batch: dict[str, torch.Tensor], share: slice, step: int = 1) -> tuple[float, float]:
    """A step of which this rank computes its share, as the loop does it; returns loss and gradient norm of the whole."""
    mine, parts, loss = {name: value[share] for name, value in batch.items()}, engine.settings.micro_batches, torch.zeros(())
    for part in range(parts):
        cut = slice(part * len(mine["x"]) // parts, (part + 1) * len(mine["x"]) // parts)
        micro_loss = engine.forward({name: value[cut] for name, value in mine.items()}, len(batch["x"]))
        engine.backward(micro_loss)
        loss += micro_loss.detach()
    sums = torch.stack([loss.double(), engine.gradient_square()])
    dist.all_reduce(sums)
    engine.step(1e-3, sums[0], sums[1])
    if finite(sums[0], sums[1].sqrt()):
        engine.average(step)
    return float(sums[0]), math.sqrt(sums[1])


def state_of(engine: Engine) -> list[torch.Tensor]:
    """All that a step changes on this rank: weights, moments and averages, the weights of the next forward, Adam's count of steps."""
    kept = [view.clone() for fragment in engine.fragments() for view in fragment.tensors.values()]
    steps = [torch.as_tensor(float(state["step"])) for state in zero_module.adamw(engine._engine).state.values()]
    return [*kept, *(p.detach() for p in engine.fill(Toy()).parameters()), *steps]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}.__getitem__


def toy_engine(zero: int, precision: str, micro_batches: int, clip: float, offload: str = "none") -> Engine:
    torch.manual_seed(0)
    settings = EngineSettings(zero, precision, micro_batches, (0.9, 0.999), 5e-4, clip, 0.99, False, 0, offload, LENGTHS)
    return Engine(toy := Toy(), weights_of(toy), settings, torch.device("cpu"))


def plain_norm() -> float:
    """Of the same gradient in plain torch, at the same weights."""
    torch.manual_seed(0)
    module, batch = Toy(), nine_items()
    (module(batch).sum() / 9).backward()
    return math.sqrt(squared_norm([p.grad for p in module.parameters() if p.grad is not None], torch.device("cpu")))


def where_a_card_is_seen(rank: int, ranks: int) -> tuple[float, str]:
    """The loss of a step of an engine on the CPU, and where its weights are, if DeepSpeed has chosen the GPU when it was imported."""
    torch.cuda.is_available = lambda: True
    set_accelerator(CUDA_Accelerator())
    engine = toy_engine(2, "fp32", 1, 0.5)
    return advance(engine, nine_items(), slice(0, 9))[0], str(engine.fill(Toy()).layers[0].weight.device)


@pytest.mark.starts
def test_an_engine_on_the_cpu_leaves_a_card_alone_that_deepspeed_has_chosen() -> None:
    ((loss, device),) = on_ranks(1, where_a_card_is_seen)
    assert math.isfinite(loss) and device == "cpu"


class Placed(Exception):
    """What an engine is made on is known."""


@pytest.mark.parametrize(("device", "chosen"), [("cuda:8", "8"), ("cuda", "0")])
def test_deepspeed_computes_on_the_card_that_ray_gave_whatever_rank_it_is_on_its_machine(
    device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give(*_: object) -> None:
        raise Placed(os.environ["LOCAL_RANK"])

    monkeypatch.setattr(zero_module, "_give_memory", give)
    settings = EngineSettings(1, "fp32", 1, (0.9, 0.999), 5e-4, 0.0, 0.99, False, 0, "none", ())
    with zero_module.last_of(2), pytest.raises(Placed, match=chosen):
        monkeypatch.setenv("LOCAL_RANK", "2")
        zero_module.wrap(Toy(), settings, torch.device(device))


def numactl_asked(rank: int, ranks: int) -> int:
    """How often a step of ZeRO-3 runs `numactl`."""
    asked = list[object]()
    os.environ.pop("LOCAL_SIZE", None)
    engine = toy_engine(3, "fp32", 3, 0.5)
    subprocess.check_output = lambda *given, **_: asked.append(given) or b""
    advance(engine, nine_items(), uneven(rank, ranks))
    return len(asked)


@pytest.mark.starts
def test_a_step_on_cpus_starts_no_process() -> None:
    assert on_ranks(2, numactl_asked) == [0, 0]


def groups_used(rank: int, ranks: int) -> list[tuple[bool, int]]:
    """Of each ZeRO stage, whether gradients travel in the group that is there, and how many groups there are after a step."""
    found = []
    for zero in range(4):
        engine = toy_engine(zero, "fp32", 2, 0.5)
        advance(engine, nine_items(), uneven(rank, ranks))
        found.append((engine._engine.seq_data_parallel_group is dist.group.WORLD, len(dist.distributed_c10d._world.pg_map)))
        engine.end()
    return found


@pytest.mark.starts
def test_gradients_travel_in_the_group_that_is_there_whose_timeout_is_ours() -> None:
    assert on_ranks(2, groups_used) == [[(True, 1)] * 4] * 2


@pytest.mark.parametrize("mig", ["MIG-11111111-2222-3333-4444-555555555555", "0"])
def test_memory_of_a_part_of_a_card_is_asked_by_its_uuid(mig: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mig)
    monkeypatch.setattr(cuda_accelerator, "pynvml", object())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (7, 9))
    assert CUDA_Accelerator().available_memory() == 7


def uneven(rank: int, ranks: int) -> slice:
    """A rank's share of nine items; the last rank has none."""
    first = rank * 9 // (ranks - 1)
    return slice(first, 9 * (rank + 1) // (ranks - 1)) if rank < ranks - 1 else slice(0, 0)


def thrown_away(rank: int, ranks: int, cases: list[tuple[int, str, int]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What becomes of steps that are not applied."""
    share, found = uneven(rank, ranks), {}
    zero_module.PERSISTENT = 0  # or ZeRO-3 would divide nothing that is so small
    for zero, precision, parts in cases:
        engine, undisturbed = (toy_engine(zero, precision, parts, clip) for clip in (0.5, 0.5))
        of = found[zero, precision, parts] = {"plain": plain_norm()}
        of["norm"] = advance(engine, nine_items(), share)[1]
        before = state_of(engine)
        of["poisoned"] = [advance(engine, nine_items(factor), share) for factor in POISONS]
        of["unchanged"] = equal(before, state_of(engine))
        advance(engine, nine_items(), share)
        for _ in range(2):
            advance(undisturbed, nine_items(), share)
        of["same"], of["moved"] = equal(state_of(engine), state_of(undisturbed)), not equal(before, state_of(engine))
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
            assert all(math.isfinite(loss) and not norm <= LARGEST_NORM for loss, norm in of["poisoned"]), what
            assert of["unchanged"] and of["moved"] and of["same"], what


def resumed(rank: int, ranks: int, cases: list[tuple[int, str, int]]) -> dict[tuple[Any, ...], bool]:
    """Whether an engine that takes over what another one had after two steps, and how many it had taken, does the same two steps more."""
    share, found = uneven(rank, ranks), {}
    for case, persistent in product(cases, (0, zero_module.PERSISTENT)):
        zero_module.PERSISTENT = persistent
        first, second = (toy_engine(*case, clip=0.5) for _ in range(2))
        for step in (1, 2):
            advance(first, nine_items(), share, step)
        parts: list[Any] = [None] * ranks
        kept = {(one.name, one.start): {kind: view.clone() for kind, view in one.tensors.items()} for one in first.fragments()}
        dist.all_gather_object(parts, kept)
        everything = {place: kinds for part in parts for place, kinds in part.items()}
        for fragment in second.held():
            for kind, view in fragment.tensors.items():
                view.data.copy_(everything[fragment.name, fragment.start][kind])
        second.resume(steps=2)
        for engine in (first, second):
            for step in (3, 4):
                advance(engine, nine_items(), share, step)
        found[*case, persistent] = equal(state_of(first), state_of(second))
    return found


@pytest.mark.starts
def test_an_engine_goes_on_bitwise_from_the_state_of_another_in_fp32_and_bf16() -> None:
    for found in on_ranks(2, resumed, [*ONE, *MANY]):
        assert all(found.values()), found


def averages(rank: int, ranks: int, zero: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every average after twelve steps, flat, with zeros where other ranks own it; and the same followed on whole weights, in float64."""
    zero_module.PERSISTENT = 0
    engine = toy_engine(zero, "fp32", 1, 0.0)
    whole = {kind: weights_after(engine) for kind in engine.settings.decays(1)}
    for step in range(1, 13):
        advance(engine, nine_items(), uneven(rank, ranks), step)
        after = weights_after(engine)
        for kind, kept in engine.settings.decays(step).items():
            whole[kind] = kept * whole[kind] + (1 - kept) * after
    sizes = {name: parameter.numel() for name, parameter in Toy().named_parameters()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    mine = {kind: torch.zeros(sum(sizes.values())) for kind in whole}
    for fragment in engine.fragments():
        for kind, flat in mine.items():
            begin = starts[fragment.name] + fragment.start
            flat[begin : begin + fragment.tensors[kind].numel()] = fragment.tensors[kind]
    return mine, whole


def weights_after(engine: Engine) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.fill(Toy()).parameters()]).double()


@pytest.mark.starts
def test_every_average_is_at_any_zero_stage_what_one_process_would_follow() -> None:
    for zero in range(4):
        (mine, whole), *others = on_ranks(3, averages, zero)
        assert list(mine) == ["average", "average-0.05", "average-0.10"]
        for kind, flat in mine.items():
            together = flat + sum(other[kind] for other, _ in others)
            assert together == pytest.approx(whole[kind], rel=1e-5, abs=1e-7), (zero, kind)
        assert not torch.allclose(whole["average"], whole["average-0.10"], atol=1e-3) and not torch.equal(flat, together), "divided"


def offloaded(rank: int, ranks: int, offload: str) -> list[Any]:
    """States after two steps, one that is thrown away, a resume of another engine, and one more; in both precisions."""
    share, found = uneven(rank, ranks), list[Any]()
    for precision, parts, persistent in (("fp32", 1, 0), ("bf16", 3, 0), ("fp32", 3, zero_module.PERSISTENT)):
        zero_module.PERSISTENT, zero_module.PIECE = persistent, 4  # of a large model there are many
        engine, second = (toy_engine(3, precision, parts, 0.5, offload) for _ in range(2))
        told = [advance(engine, nine_items(factor), share, step) for step, factor in ((1, 1.0), (2, 1.0), (3, math.inf))]
        for mine, other in zip(engine.held(), second.held(), strict=True):
            for kind, view in mine.tensors.items():
                other.tensors[kind].data.copy_(view)
        second.resume(steps=2)
        told += [advance(one, nine_items(), share, 3) for one in (engine, second)]
        found.append(([str(one) for one in told], state_of(engine), state_of(second)))
    return found


@pytest.mark.starts
def test_what_waits_in_host_memory_changes_no_bit_of_a_step_of_one_that_is_thrown_away_and_of_a_resume() -> None:
    """On CPU ranks, where the same kernels update either way; what a GPU would do is another matter."""
    plain, *others = (on_ranks(2, offloaded, offload) for offload in ("none", "optimizer", "all"))
    for rank, found in enumerate(plain):
        for case, (told, state, second) in enumerate(found):
            assert told[3] == told[4] and not math.isfinite(float(told[2].strip("()").split(",")[1])) and equal(state, second)
            for other in others:
                assert other[rank][case][0] == told and equal(other[rank][case][1], state) and equal(other[rank][case][2], state)


PARTS = 128


class Wide(torch.nn.Module):
    """One layer, whose gradient is a sum over items of one sign, of which a sum in bf16 stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 32, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(batch["x"].to(self.layer.weight.dtype)).float().sum(1)


def sum_error(rank: int, ranks: int) -> dict[int, float]:
    """Of each ZeRO stage, how far the gradient of many micro-batches in bf16 is from the float64 sum of their own gradients."""
    x, found = torch.rand(ranks * PARTS, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), {}
    zero_module.PERSISTENT = 0
    for zero in (1, 2, 3):
        settings = EngineSettings(zero, "bf16", PARTS, (0.9, 0.999), 0.0, 0.0, 0.99, False, 0, "none", ())
        engine = Engine(wide := Wide(), weights_of(wide), settings, torch.device("cpu"))
        for item in x[rank::ranks].split(1):
            engine.backward(engine.forward({"x": item, "weight": torch.ones(1)}, 1))
        optimizer, everything = engine._engine.optimizer, [torch.empty(0)] * ranks
        parts = [optimizer.grad_partitions_flat_buffer] if zero == 3 else optimizer.averaged_gradients[0]
        dist.all_gather_object(everything, torch.cat([part.flatten() for part in parts]))
        scale = ranks if zero == 3 else 1  # whose mean is over ranks: the backward is of so many times the loss
        gradient, exact = torch.cat(everything)[: 64 * 32].double(), (x * scale).double().sum(0).expand(32, 64) / scale
        found[zero] = float((gradient.view(32, 64) - exact).norm() / exact.norm())
    return found


@pytest.mark.starts
@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_of_many_micro_batches_in_bf16_are_summed_in_fp32(ranks: int) -> None:
    for found in on_ranks(ranks, sum_error):
        assert all(error < 1e-6 for error in found.values()), found


def first_losses(rank: int, ranks: int) -> dict[str, float]:
    """The loss of the same items in each precision, before anything is learnt."""
    found = {}
    for precision in ("fp32", "bf16"):
        found[precision] = advance(toy_engine(1, precision, 1, 0.0), nine_items(), uneven(rank, ranks))[0]
    return found


@pytest.mark.starts
def test_a_loss_in_bf16_is_that_in_fp32_but_for_its_roundings() -> None:
    """Inputs, two layers' weights, sums and biases, what lies between: ten roundings to 8 bits on the way, whose effect is squared."""
    for found in on_ranks(2, first_losses):
        assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=2 * 10 * 2**-9)
