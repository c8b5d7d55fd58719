"""What only a GPU shows: parts of a few seconds each, every one of which tells its figures as soon as they are known."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cluster.bench.card import Card
from cluster.bench.training import random_batch
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention
from cluster.runtime.device import peak_flops, peak_memory
from cluster.runtime.failures import failure_of
from cluster.storage import open_store
from cluster.training.engine import Engine
from cluster.training.memory import OFFLOADED
from cluster.training.rehearsal import rehearse
from reactdiff.clip import FRAME_RATE
from reactdiff.data.keyed import normal
from reactdiff.determinism import make_deterministic
from reactdiff.generate import Reactor
from reactdiff.model.codec import Codec
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import build, flops_per_item, stored_batch

LARGEST = 256
"""Items of the largest batch that is tried."""

PROFILED = 3
"""Steps of a profile."""

TOP = 10
"""Kernels of a profile that are told."""

CardFigures = Iterator[tuple[str, Any]]
"""What a part finds, each as soon as it is known: what it is of, and a number or several by name. The same name again replaces it."""


def parity(card: Card) -> CardFigures:
    """Losses of both stages in fp32 on the device, against float64 on the CPU."""
    for stage, kind in card.kinds.items():
        batch = random_batch(kind, 1, torch.device("cpu"))
        losses = {}
        for device, dtype in ((torch.device("cpu"), torch.float64), (card.device, torch.float32)):
            make_deterministic(card.experiment.workers.threads)
            module = _moved(build(kind, card.experiment.seed)).to(device=device, dtype=dtype).eval()
            there = {name: tensor.to(device) if tensor.dtype == torch.long else tensor.to(device, dtype) for name, tensor in batch.items()}
            with torch.no_grad():
                losses[dtype] = float(module(there).sum())
        exact = losses[torch.float64]
        yield f"{stage}, relative error of the loss", abs(losses[torch.float32] - exact) / abs(exact)


@torch.no_grad()
def _moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with all of its weights moved a little: what starts at zero would hide the rest."""
    for name, parameter in module.named_parameters():
        parameter.add_(torch.from_numpy(normal(tuple(parameter.shape), "bench", name)), alpha=0.02)
    return module


ENGINES = [(precision, zero) for precision in ("fp32", "tf32", "bf16") for zero in (0, 1, 2, 3)[precision == "bf16" :]]
"""Precisions and ZeRO stages that are measured."""


def plan_engines(card: Card) -> dict[tuple[str, str, int], int]:
    """Bytes that `engines` is to hold at most by the plan of `--dry-run`, of each (stage, precision, ZeRO stage).

    It takes half a minute of a CPU, in a process that is in no group of torch.distributed yet.
    """
    found: dict[tuple[str, str, int], int] = {}
    for stage, kind in card.kinds.items():
        items = card.items(stage)
        batch = sum(tensor.nbytes for tensor in stored_batch(kind, items, "meta").values())
        for precision, zero in ENGINES:
            settings = card.settings(stage, precision=precision, zero=zero)
            alike = found.get((stage, "fp32", zero)) if precision == "tf32" else None
            found[stage, precision, zero] = alike or batch + rehearse(kind, settings, 1, items, card.device.type == "cuda").living
    return found


def engines(card: Card) -> CardFigures:
    """Speed and memory of a step at each ZeRO stage and precision, beside the plan's memory."""
    for stage, kind in card.kinds.items():
        flops = flops_per_item(kind)
        for precision, zero in ENGINES:
            name = f"{stage}, batch {card.items(stage)}, {precision}, ZeRO-{zero}"
            yield _figure(name, _engine_figures, card, stage, precision, zero, flops)


def _engine_figures(card: Card, stage: str, precision: str, zero: int, flops: float) -> dict[str, Any]:
    items, planned, cuda = card.items(stage), card.planned[stage, precision, zero], card.device.type == "cuda"
    with card.engine(stage, zero=zero, precision=precision) as engine:
        seconds = card.seconds(card.step(engine, stage, items))
    held, peak = peak_memory(card.device), peak_flops(card.device, precision)
    return {
        "items/s": items / seconds,
        "ms a step": 1e3 * seconds,
        "MFU": flops * items / seconds / peak if peak else None,
        "peak memory, GB": held / 1e9,
        "planned, GB": planned / 1e9,
        "held / planned": held / planned if cuda else None,  # a CPU's is that of the process, ever since
    }


def batches(card: Card) -> CardFigures:
    """Speed with the largest batch that fits, with and without activations that are computed again; bf16, ZeRO-1."""
    for stage, kind in card.kinds.items():
        for again in (False, True):
            yield from _larger_batches(card, stage, again, flops_per_item(kind))


def _larger_batches(card: Card, stage: str, again: bool, flops: float) -> CardFigures:
    name, items = f"{stage}{', recompute' * again}", 1
    try:
        with card.engine(stage, zero=1, precision="bf16", recompute=again) as engine:
            while items <= LARGEST:
                seconds, peak = card.seconds(card.step(engine, stage, items), repeats=2), peak_flops(card.device, "bf16")
                yield (
                    name,
                    {
                        "items": items,
                        "items/s": items / seconds,
                        "MFU": flops * items / seconds / peak if peak else None,
                        "peak memory, GB": peak_memory(card.device) / 1e9,
                    },
                )
                if card.device.type != "cuda":  # a CPU would swap before it refuses
                    break
                items *= 2
    except Exception as error:
        if items == 1 or (failure := failure_of(error)) is None or failure.name != "out_of_memory":
            yield f"{name}, batch {items}", _why(error)


def twice(card: Card) -> CardFigures:
    """Whether the same steps end in the same bits, in each precision."""
    for stage in card.kinds:
        for precision in ("fp32", "bf16"):
            yield _figure(f"{stage}, {precision}", _same_twice, card, stage, precision)


def _same_twice(card: Card, stage: str, precision: str) -> bool:
    ends = []
    for _ in range(2):
        with card.engine(stage, zero=1, precision=precision) as engine:
            step = card.step(engine, stage, card.items(stage))
            for number in range(3):
                torch.manual_seed(number)
                step()
            ends.append([view.detach().cpu() for one in engine.fragments() for view in one.tensors.values()])
        del engine, step
    return all(map(torch.equal, *ends))


def compiled(card: Card) -> CardFigures:
    """A step as it is, compiled (`workers.compile`), and compiled and replayed as CUDA graphs; bf16, ZeRO-1."""
    for stage in card.kinds:
        items = card.items(stage)
        ways = [("eager", 0, False), ("compiled", items, False), ("compiled, CUDA graphs", items, True)]
        for name, compile_for, graphs in ways if card.device.type == "cuda" else ways[:2]:  # a CPU has no such graphs
            yield _figure(f"{stage}, {name}", _compiled_step, card, stage, compile_for, graphs)


def _compiled_step(card: Card, stage: str, compile_for: int, graphs: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"triton.cudagraphs": graphs}),
        card.engine(stage, zero=1, precision="bf16", compile_for=compile_for) as engine,
    ):
        step, begin = card.step(engine, stage, card.items(stage)), time.perf_counter()
        step()
        card.wait()
        first, seconds = time.perf_counter() - begin, card.seconds(step)
    return {"ms a step": 1e3 * seconds, "first step, s": first, "peak memory, GB": peak_memory(card.device) / 1e9}


def offloaded(card: Card) -> CardFigures:
    """A step with nothing, the optimiser and all in host memory (`workers.offload`); bf16, ZeRO-3."""
    for stage in card.kinds:
        for offload in OFFLOADED:
            yield _figure(f"{stage}, {offload}", _offloaded_step, card, stage, offload)


def _offloaded_step(card: Card, stage: str, offload: str) -> dict[str, Any]:
    with card.engine(stage, zero=3, precision="bf16", offload=offload) as engine:
        seconds = card.seconds(card.step(engine, stage, card.items(stage)))
    return {"ms a step": 1e3 * seconds, "peak memory, GB": peak_memory(card.device) / 1e9}


def _figure(name: str, measure: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """What one configuration gives, or why it gives nothing: another one may fit where it does not."""
    try:
        return name, measure(*arguments)
    except Exception as error:
        return name, _why(error)


def _why(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def copies(card: Card) -> CardFigures:
    """What a step pays for batches that come from host memory, copied a step ahead."""
    for stage in card.kinds:
        yield _figure(stage, _fed_and_resident, card, stage)


def _fed_and_resident(card: Card, stage: str) -> dict[str, Any]:
    with card.engine(stage) as engine:
        resident, fed = (card.seconds(step(engine, stage, card.items(stage))) for step in (card.step, card.fed_step))
    return {"ms a step, resident": 1e3 * resident, "ms a step, from the host": 1e3 * fed, "waiting": 1 - resident / fed}


def checkpoint(card: Card) -> CardFigures:
    """How long a checkpoint holds up a step, against a plain copy, and how slow steps are while it is written."""
    stage = list(card.kinds)[-1]
    with card.engine(stage) as engine:
        yield from _checkpoint_of(card, stage, engine)


def _checkpoint_of(card: Card, stage: str, engine: Engine) -> CardFigures:
    step = card.step(engine, stage, card.items(stage))
    usual = card.seconds(step)
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(open_store(folder), lambda value: [value], 0, Retention(1), lambda: None)
        buffers = dict(engine.stage.named_buffers())
        writer.prepare(engine.fragments(), buffers).result()
        facts: dict[str, Any] = {"stage": stage, "steps": 0, "life": 1, "dataset": "", "config": {}}
        held, written = [], []
        for number in range(3):
            card.wait()
            begin = time.perf_counter()
            writer.begin(engine.fragments(), buffers, progress=number, **facts)
            held.append(time.perf_counter() - begin)
            while not writer.uploaded:
                begin = time.perf_counter()
                step()
                card.wait()
                written.append(time.perf_counter() - begin)
            writer.commit()
        writer.close()
    state = [view for one in engine.fragments() for view in one.tensors.values()]
    targets = [torch.empty(view.shape).fill_(0) for view in state]
    plain = card.seconds(lambda: [target.copy_(view) for target, view in zip(targets, state, strict=True)], repeats=3)
    yield "GB", sum(view.nbytes for view in state) / 1e9
    yield "held up, ms", 1e3 * median(held)
    yield "plain copy, ms", 1e3 * plain
    yield "step, ms", 1e3 * usual
    yield "step while it is written, ms", 1e3 * median(written) if written else None


def reactions(card: Card) -> CardFigures:
    """Encoding both persons of a clip, and reactions to it, against real time."""
    make_deterministic(card.experiment.workers.threads)
    codec, diffusion = (build(kind, card.experiment.seed).eval().to(card.device) for kind in card.kinds.values())
    assert isinstance(codec, Codec) and isinstance(diffusion, LatentDiffusion)
    frames, count = card.source.frames, card.experiment.evaluation.predictions
    streams = {name: torch.from_numpy(normal((2, frames, card.source.width(name)), "bench", name)) for name in codec.inputs}
    reactor, clip = Reactor(codec, diffusion), frames / FRAME_RATE

    @torch.no_grad()
    def encode() -> np.ndarray:
        return codec.encode({name: stream.to(card.device) for name, stream in streams.items()}).half().cpu().numpy()

    latents = encode()
    encoding = card.seconds(encode)
    yield "encoding a clip, s", encoding
    yield "times faster than real time", clip / encoding
    drawing = card.seconds(lambda: reactor.react(latents[:1], [("clip", 0)], count, 0), repeats=2)
    yield f"{count} reactions to a clip, s", drawing
    yield "reactions a second of real time", count * clip / drawing / clip


def profiled(card: Card) -> CardFigures:
    """What a step of each stage spends its time on, and how often the host waits for the device in it."""
    for stage in card.kinds:
        yield from _profile(card, stage)


def _profile(card: Card, stage: str) -> CardFigures:
    cuda = card.device.type == "cuda"
    with card.engine(stage) as engine:
        step = card.fed_step(engine, stage, card.items(stage))
        card.seconds(step, repeats=1)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
            for _ in range(PROFILED):
                step()
    events = seen.key_averages()
    waits = sum(event.count for event in events if "Synchronize" in event.key) - 1  # the profiler's own, at its end
    yield f"{stage}, times that the host waits in a step", waits / PROFILED if cuda else None
    for name, share, calls in longest(events, cuda):
        yield f"{stage}, {name}", {"share": share, "calls a step": calls / PROFILED}


def longest(events: Iterable[Any], cuda: bool) -> list[tuple[str, float, int]]:
    """What most of a profile's time went to: name, share of the whole, calls.

    On a GPU only kernels are counted: operators that start them, and regions with a name, have their time a second time.
    """
    if cuda:
        kernels = (event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
        spent = [(event.self_device_time_total, event) for event in kernels]
    else:
        spent = [(event.self_cpu_time_total, event) for event in events]
    whole = sum(time for time, _ in spent) or 1.0
    most = sorted(spent, key=itemgetter(0), reverse=True)[:TOP]
    return [(event.key, time / whole, event.count) for time, event in most]


PARTS: Mapping[str, Callable[[Card], CardFigures]] = {
    "parity": parity,
    "engines": engines,
    "batches": batches,
    "twice": twice,
    "copies": copies,
    "checkpoint": checkpoint,
    "reactions": reactions,
    "profile": profiled,
    "compiled": compiled,
    "offload": offloaded,
}
"""Name -> what measures it, in the order in which they are done."""
