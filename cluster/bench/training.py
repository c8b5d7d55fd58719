"""How fast a rank trains, against the same module in a plain PyTorch loop on the same device."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.bench.overhead import telemetry_overhead
from cluster.config.schema import Experiment
from cluster.runtime.device import best_device, peak_flops, peak_memory
from cluster.training.agreement import Verdict, Word
from cluster.training.engine import Engine
from cluster.training.settings import engine_settings
from reactdiff.data.keyed import normal
from reactdiff.determinism import make_deterministic
from reactdiff.generate import Reactor
from reactdiff.model.codec import Codec
from reactdiff.model.init import initial_weights
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.online import Listener
from reactdiff.stage import (
    AutoencoderStage,
    DiffusionStage,
    Source,
    Stage,
    build,
    build_without_memory,
    flops_per_item,
    stages_over,
    stored_batch,
)

WARM_UP = 3

NOTHING_ELSE = Word(*[0.0] * len(Word._fields))
"""What the one rank of a bench tells beside loss and gradient."""


@dataclass(frozen=True)
class StepSpeed:
    """What was measured of one stage.

    Attributes:
        items_per_second: through the ZeRO engine.
        plain: the same in a plain PyTorch loop: torch's fused AdamW, no averaged weights, the same kernels.
        mfu: share of the device's peak, 0 where that is not known.
        peak_memory: bytes.
        telemetry: share of a step's CPU time that is spent to be counted, seen in five pairs with and without.
    """

    items_per_second: float
    plain: float
    mfu: float
    peak_memory: int
    telemetry: float


def bench_training(experiment: Experiment, name: str, source: Source, steps: int) -> StepSpeed:
    """Train one stage on this process alone, on random data that is there already: compute, not input, is measured.

    Args:
        experiment: its configuration; `workers` counts as one rank.
        name: the stage.
        source: widths and frames.
        steps: measured optimiser steps of each rival, in turns.
    """
    make_deterministic(experiment.workers.threads, tf32=experiment.optim.precision == "tf32")
    device = best_device()
    batch_items, settings = experiment.optim.batch[name], engine_settings(experiment, name, ranks=1)
    kind = stages_over(source, experiment.model, experiment.diffusion)[name]
    batch = random_batch(kind, batch_items, device)
    flops = flops_per_item(kind)
    parts = settings.micro_batches
    module = build_without_memory(kind)
    engine = Engine(module, initial_weights(module, experiment.seed), settings, device)
    step = engine_step(engine, batch, batch_items, parts)
    ours = _timed(step, steps, device)
    memory = peak_memory(device)
    telemetry = telemetry_overhead(name, step, steps, device)
    plain = _timed(_plain_step(build(kind, experiment.seed).to(device), batch, experiment, parts), steps, device)
    speed = batch_items / ours
    peak = peak_flops(device, settings.precision)
    return StepSpeed(speed, batch_items / plain, speed * flops / peak if peak else 0.0, memory, telemetry)


def bench_online(experiment: Experiment, source: Source, chunks: int, count: int) -> list[float]:
    """Seconds that each chunk of a clip takes an online listener, untrained: to react, and to listen.

    Args:
        experiment: with `model.online`.
        source: widths of the speaker's streams.
        chunks: of the clip.
        count: K.
    """
    first = AutoencoderStage(experiment.model, source)
    second = DiffusionStage(experiment.model, experiment.diffusion, first.encoded())
    codec, diffusion = (build(kind, experiment.seed).eval().to(best_device()) for kind in (first, second))
    assert isinstance(codec, Codec) and isinstance(diffusion, LatentDiffusion)
    listener = Listener(Reactor(codec, diffusion), ("clip", 0), count, experiment.seed)
    spent = []
    for chunk in range(WARM_UP + chunks):
        streams = {name: normal((listener.chunk, source.width(name)), "bench", name, chunk) for name in listener.hears}
        start = time.perf_counter()
        listener.react()
        listener.hear(streams)
        spent.append(time.perf_counter() - start)
    return spent[WARM_UP:]


def engine_step(engine: Engine, batch: dict[str, torch.Tensor], items: int, parts: int) -> Callable[[], None]:
    """A step of an engine on a batch of so many items, in so many micro-batches, as the training loop takes it."""
    weighted = batch | {"weight": torch.ones(items, device=engine.device)}

    def step() -> None:
        loss = torch.zeros((), device=engine.device)
        for part in range(parts):
            size = slice(part * items // parts, (part + 1) * items // parts)
            part_loss = engine.forward({key: tensor[size] for key, tensor in weighted.items()}, items)
            engine.backward(part_loss)
            loss += part_loss.detach()
        sums = NOTHING_ELSE.summed(loss, engine.gradient_square())
        engine.step(1e-4, sums[0], sums[1])
        Verdict.read(sums)
        engine.average(1)

    return step


def _plain_step(module: torch.nn.Module, batch: dict[str, torch.Tensor], experiment: Experiment, parts: int) -> Callable[[], None]:
    half = experiment.optim.precision == "bf16"
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=experiment.optim.weight_decay, fused=True)
    items = len(next(iter(batch.values())))

    def step() -> None:
        for part in range(parts):
            size = slice(part * items // parts, (part + 1) * items // parts)
            with torch.autocast(next(module.parameters()).device.type, torch.bfloat16, enabled=half):
                loss = module({key: tensor[size] for key, tensor in batch.items()}).sum() / items
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of one step, the median."""
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[WARM_UP:])[steps // 2]


def random_batch(kind: Stage, items: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch in the shapes and types that datasets have, on a device: one item of noise, repeated, for noise is drawn on the host."""
    one = {name: _random(tensor).to(device) for name, tensor in stored_batch(kind, 1, "cpu").items()}
    return {name: tensor.repeat(items, *[1] * (tensor.dim() - 1)) for name, tensor in one.items()}


def _random(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.long:
        return tensor
    return (torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.3).to(tensor.dtype)


def alone(device: torch.device) -> None:
    """Make this process a group of one rank, which computes on a device."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
