"""What only a GPU shows: parts of a few seconds each, whose figures are written as soon as they are known.

It needs torch, DeepSpeed, NumPy, pydantic, PyYAML, rich and safetensors, and neither Ray nor object storage: whoever has a card for ten
minutes brings every figure back. On a CPU it measures the CPU.
"""

import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cluster.bench.training import engine_step, random_batch
from cluster.config.schema import Experiment
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.retention import Retention
from cluster.runtime.device import peak_flops, peak_memory
from cluster.runtime.failures import failure_of
from cluster.runtime.nvml import driver_version
from cluster.storage import open_store
from cluster.training.ahead import Ahead
from cluster.training.engine import Engine
from cluster.training.memory import OFFLOADED
from cluster.training.rehearsal import rehearse
from cluster.training.settings import EngineSettings, engine_settings
from reactdiff.clip import FRAME_RATE
from reactdiff.data.keyed import normal
from reactdiff.determinism import make_deterministic
from reactdiff.generate import Reactor
from reactdiff.model.codec import Codec
from reactdiff.model.init import initial_weights
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, Stage, build, build_without_memory, flops_per_item, stages_over, stored_batch

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pydantic", "pyyaml", "rich", "safetensors")

LARGEST = 256
"""Items of the largest batch that is tried."""

PROFILED = 3
"""Steps of a profile."""

TOP = 10
"""Kernels of a profile that are told."""

LIMIT = 600.0
"""Seconds after which no other figure of a GPU is begun: who has one has it for ten minutes."""

Found = dict[str, Any]
CardFigures = Iterator[tuple[str, Any]]
"""What a part finds, each as soon as it is known: what it is of, and a number or several by name. The same name again replaces it."""


@dataclass(frozen=True)
class Card:
    """What is measured on.

    Attributes:
        experiment: its configuration.
        source: what a dataset of clips would hold.
        device: where.
        steps: measured steps of each kind.
        planned: bytes of each (stage, precision, ZeRO stage) of `plan_engines`.
    """

    experiment: Experiment
    source: Source
    device: torch.device
    steps: int
    planned: Mapping[tuple[str, str, int], int] = field(default_factory=dict)

    @property
    def kinds(self) -> Mapping[str, Stage]:
        """The stages."""
        return stages_over(self.source, self.experiment.model, self.experiment.diffusion)

    def items(self, stage: str) -> int:
        """Items of one step of one rank, as configured."""
        return self.experiment.workers.micro_batch or -(-self.experiment.optim.batch[stage] // self.experiment.workers.most)

    def settings(self, stage: str, **changes: Any) -> EngineSettings:
        """Of an engine of one rank, as configured but for changes."""
        return replace(engine_settings(self.experiment, stage, ranks=1), micro_batches=1, **changes)

    @contextmanager
    def engine(self, stage: str, **changes: Any) -> Iterator[Engine]:
        """An engine with these settings, which is ended; memory is counted anew from here on."""
        self.forget()
        settings = self.settings(stage, **changes)
        make_deterministic(self.experiment.workers.threads, tf32=settings.precision == "tf32")
        module = build_without_memory(self.kinds[stage])
        engine = Engine(module, initial_weights(module, self.experiment.seed), settings, self.device)
        try:
            yield engine
        finally:
            engine.end()

    def step(self, engine: Engine, stage: str, items: int) -> Callable[[], None]:
        """A step on a batch that is on the device already."""
        return engine_step(engine, random_batch(self.kinds[stage], items, self.device), items, 1)

    def fed_step(self, engine: Engine, stage: str, items: int) -> Callable[[], None]:
        """A step as in a run: on a batch that was copied from host memory beside the step before."""
        ahead, host = Ahead(self.device), random_batch(self.kinds[stage], items, torch.device("cpu"))
        if self.device.type == "cuda":
            host = {name: tensor.pin_memory() for name, tensor in host.items()}
        coming = SimpleNamespace(step=0, tensors=host)
        ahead.copy(coming)

        def step() -> None:
            nonlocal coming
            now, coming = coming, SimpleNamespace(step=coming.step + 1, tensors=host)
            tensors = ahead.take(now)
            ahead.copy(coming)
            engine_step(engine, tensors, items, 1)()
            ahead.drop(now)

        return step

    def seconds(self, work: Callable[[], Any], repeats: int = 0) -> float:
        """The median of some repeats, after two that warm up."""
        spent = []
        for _ in range(2 + (repeats or self.steps)):
            begin = time.perf_counter()
            work()
            self.wait()
            spent.append(time.perf_counter() - begin)
        return median(spent[2:])

    def wait(self) -> None:
        """Until the device has done what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Let go of what nobody refers to, and count memory anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


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


def _engine_figures(card: Card, stage: str, precision: str, zero: int, flops: float) -> Found:
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


def _compiled_step(card: Card, stage: str, compile_for: int, graphs: bool) -> Found:
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


def _offloaded_step(card: Card, stage: str, offload: str) -> Found:
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


def _fed_and_resident(card: Card, stage: str) -> Found:
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


def measure_card(card: Card, parts: Sequence[str], folder: Path, progress: Callable[[int, int], None]) -> Found:
    """Measure parts one after the other; after each figure, all so far are in `card.json` and `card.md` of a folder.

    A part that fails is told as such beside what it had found, and the next one begins. After LIMIT the rest is told not to be measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: Found = {"machine": _machine(card)}
    end = time.perf_counter() + (LIMIT if card.device.type == "cuda" else float("inf"))
    for number, part in enumerate(parts, start=1):
        begin, figures = time.perf_counter(), found.setdefault(part, {})
        try:
            for name, figure in _until(end, part, PARTS[part](card)):
                figures[name] = figure
                _keep(found, folder)
        except Exception as error:
            figures["failed"] = f"{type(error).__name__}: {error}"
        figures["seconds of this part"] = round(time.perf_counter() - begin, 1)
        _keep(found, folder)
        progress(number, len(parts))
    return found


def _until(end: float, part: str, figures: CardFigures) -> CardFigures:
    """A part's figures, none of which is begun after a time of `time.perf_counter`."""
    while time.perf_counter() < end:
        if (figure := next(figures, None)) is None:
            return
        yield figure
    yield "not measured", f"{LIMIT / 60:g} minutes are over: `--only {part}` measures the rest"


def page(found: Found) -> str:
    """All figures as tables of Markdown, a part each."""
    lines = []
    for part, figures in found.items():
        lines += [f"## {part}", ""]
        rows = {name: value for name, value in figures.items() if isinstance(value, dict)}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        if rows:
            lines += ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
            lines += ["| " + " | ".join([name, *(_cell(row.get(column, "")) for column in columns)]) + " |" for name, row in rows.items()]
            lines.append("")
        lines += [f"- {name}: {_cell(value)}" for name, value in figures.items() if name not in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@torch.no_grad()
def _moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module with all of its weights moved a little: what starts at zero would hide the rest."""
    for name, parameter in module.named_parameters():
        parameter.add_(torch.from_numpy(normal(tuple(parameter.shape), "bench", name)), alpha=0.02)
    return module


def _machine(card: Card) -> Found:
    versions: Found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    if card.device.type == "cuda":
        properties = torch.cuda.get_device_properties(card.device)
        device = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        versions |= {
            "driver": driver_version(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    else:
        device = platform.processor() or "CPU"
    return {"device": device, "python": platform.python_version(), **versions}


def _keep(found: Found, folder: Path) -> None:
    _write(folder / "card.json", json.dumps(found, indent=1))
    _write(folder / "card.md", page(found))


def _write(path: Path, text: str) -> None:
    whole = path.with_suffix(f"{path.suffix}.part")
    whole.write_text(text)
    whole.replace(path)
