"""DeepSpeed ZeRO around one stage of training: gradients of the global batch, fp32 master state by fragments, EMA.

The only module that knows DeepSpeed, including the private names through which a rank reaches its own fragments of the
fp32 weights and of Adam's state; they are those of DeepSpeed 0.19.8, which the project pins. DeepSpeed's own checkpoints
are not used: they load at no other number of ranks.
"""

import ctypes
import logging
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.config.schema import Experiment
from reactdiff.averages import LENGTHS, average_kind, decay
from reactdiff.model.init import Weights
from reactdiff.model.recompute import recompute

if not torch.cuda.is_available():  # of a rank its environment says it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import ZERO_OPTIMIZATION
from deepspeed.utils import groups

ALIGNED = 1024  # DeepSpeed wants buckets that divide evenly
BUCKET = 50 * 1024 * ALIGNED
"""Most elements that are reduced or gathered in one collective."""

PIECE = ALIGNED * ALIGNED
"""Elements of which a norm is taken in fp32; norms are summed in fp64."""

PERSISTENT = 100_000
"""Parameters with fewer elements are not divided by ZeRO-3: to gather each for itself would cost more than they weigh."""

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS, "average")
"""What a checkpoint keeps of each parameter: fp32 weight, Adam's two moments, averaged weight (EMA).

With `diffusion.ema_every` there are averages of `LENGTHS`, too (`average_kind`).
"""

LARGEST_NORM = 1e19
"""Of a gradient that may be applied. Adam keeps the squares in fp32, where those of a larger one are infinite, and stay so.

Of smaller ones no update moves a weight by more than about ten learning rates, which are finite: weights stay finite.
"""

Tensors = dict[str, torch.Tensor]


class NonFinite(RuntimeError):
    """A loss or gradient is not a number any more; says of which step, and which of its items are to blame.

    Attributes:
        items: the numbers of those; none where it is the weights.
    """

    failure = "non_finite"

    def __init__(self, text: str, items: Sequence[int] = ()):
        super().__init__(text)
        self.items = tuple(items)


def finite(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Whether a step with this loss and gradient norm may be applied; all are scalars."""
    return loss.isfinite() & (norm <= LARGEST_NORM)


def squared_norm(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of the squares of all elements, a float64 on their device; not finite if one of them is not."""
    parts = [gradient for gradient in gradients if gradient.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts, 2, torch.float32)).double().square().sum().to(device)


@dataclass(frozen=True)
class EngineSettings:
    """How one engine trains; every value is explicit, since DeepSpeed's defaults change results (clipping is 1.0)."""

    zero: int
    precision: str
    micro_batches: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema: float
    recompute: bool
    compile_for: int
    """Items of the largest micro-batch, for which forward and backward are compiled; 0: they are not."""

    offload: str
    """What lies in host memory: "none", "optimizer" or "all"."""

    lengths: tuple[float, ...]
    """Relative lengths of averages that are kept beside that of `ema`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of each parameter."""
        return *KINDS, *map(average_kind, self.lengths)

    def decays(self, step: int) -> dict[str, float]:
        """What each average keeps of itself when step `step` (from 1) enters it."""
        return {"average": self.ema, **{average_kind(length): decay(length, step) for length in self.lengths}}


def engine_settings(experiment: Experiment, stage: str, ranks: int) -> EngineSettings:
    """How an experiment trains a stage on so many ranks."""
    optim, workers = experiment.optim, experiment.workers
    whole_share = -(-optim.batch[stage] // workers.most) if workers.least < workers.most else 0
    parts = micro_batches(optim.batch[stage], ranks, workers.micro_batch or whole_share)
    return EngineSettings(
        zero=zero_stage(workers.zero, optim.precision, ranks, workers.offload),
        precision=optim.precision,
        micro_batches=parts,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        ema=optim.ema[stage],
        recompute=workers.recompute,
        compile_for=-(-optim.batch[stage] // (ranks * parts)) if workers.compile else 0,
        offload=workers.offload,
        lengths=LENGTHS if experiment.ema_every(stage) else (),
    )


def zero_stage(asked: int, precision: str, ranks: int, offload: str = "none") -> int:
    """The ZeRO stage that is used: one rank has nobody to divide anything with, and weights that are not bf16 are their own masters."""
    return 0 if ranks == 1 and precision != "bf16" and offload == "none" else asked


def micro_batches(batch: int, ranks: int, largest: int) -> int:
    """Forward passes of one step on each rank: the rank's largest share over the largest micro-batch."""
    share = -(-batch // ranks)
    return -(-share // largest) if largest else 1


@dataclass(frozen=True)
class Fragment:
    """The stretch of one parameter this rank owns; `tensors` are live, flat, writable fp32 views.

    Attributes:
        name: parameter name.
        shape: shape of the whole parameter.
        start: first element of the stretch in the flattened parameter.
        tensors: kind (see `EngineSettings.kinds`) -> (count,) view.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]


class Engine:
    """One rank's part in training a stage, a module whose forward maps a batch to one loss per item.

    Args:
        stage: the module; of its parameters only names and shapes count, so they may have no memory (device "meta").
        weights: what each of them begins with, the same on every rank; torch.distributed must be initialised.
        settings: how to train.
        device: where this rank computes.
    """

    def __init__(self, stage: nn.Module, weights: Weights, settings: EngineSettings, device: torch.device):
        if device.type == "cpu":
            if get_accelerator().device_name() != "cpu":  # outside workers it takes a GPU wherever there is one
                set_accelerator(CPU_Accelerator())
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute
        deepspeed.utils.logger.setLevel(logging.WARNING)
        _import_muon()
        self.settings, self.device = settings, device
        self._cached = False
        self._ranks, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        config = _deepspeed_config(settings, [p.numel() for p in stage.parameters()], device)
        if settings.recompute:
            recompute(stage)
        if settings.compile_for:
            if device.type == "cuda":
                _assert_triton_builds()
            _compile(stage)
        _give_memory(stage, config, device)
        self._engine, *_ = deepspeed.initialize(
            model=stage,
            model_parameters=[p for p in stage.parameters() if p.requires_grad],
            config=config,
            dist_init_required=False,
        )
        _take_over(self._engine, self._ranks)
        _trim()  # DeepSpeed has moved what was divided
        _make_adam_state(self._engine)
        self._owned = list(_own(self._engine))
        self._masters = [master.detach() for _, _, _, master, _ in self._owned]
        with torch.no_grad():
            for (name, _, start, _, _), master in zip(self._owned, self._masters, strict=True):
                master.copy_(weights(name).reshape(-1)[start : start + master.numel()])
            self._averages = {kind: [master.clone() for master in self._masters] for kind in settings.decays(1)}
        self.resume(steps=0)

    @property
    def stage(self) -> nn.Module:
        """The wrapped module."""
        return self._engine.module

    def forward(self, micro_batch: Tensors, items: int) -> torch.Tensor:
        """Forward of one micro-batch, which may be empty or smaller than other ranks'.

        Args:
            micro_batch: tensors of this rank, with a `weight` of 0 or 1 for each item.
            items: valid items of the step over all ranks and micro-batches, the loss's denominator.

        Returns:
            This micro-batch's part of the step's mean loss; hand it to `backward`.
        """
        if self.settings.compile_for:
            micro_batch = _filled(micro_batch, self.settings.compile_for)
            self._fill_caches(micro_batch)
        weight = micro_batch["weight"]
        losses = self._engine({name: value for name, value in micro_batch.items() if name != "weight"})
        return (losses * weight).sum() / max(items, 1)

    def _fill_caches(self, batch: Tensors) -> None:
        """Once, before it is compiled: what a module keeps from its first forward on would have the second one compiled again."""
        if not self._cached:
            with torch.no_grad(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.stage.forward({name: value for name, value in batch.items() if name != "weight"})
            self._cached = True

    def backward(self, part: torch.Tensor) -> None:
        """Backward of what `forward` returned; DeepSpeed averages over ranks and micro-batches, so undo that."""
        self._engine.backward(part * (self._ranks * self.settings.micro_batches))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def gradient_square(self) -> torch.Tensor:
        """Squared norm of this rank's part of the step's gradient, before clipping, after the last `backward` of a step.

        Each element of the global batch's gradient is counted by exactly one rank, so the sum over the ranks is the square
        of its norm. It is not finite where an element is not. A float64 on the device: nothing waits for it.
        """
        if self.settings.zero == 0:  # every rank holds everything
            gradients = [p.grad for p in self.stage.parameters() if p.requires_grad][self._rank :: self._ranks]
            return squared_norm([gradient for gradient in gradients if gradient is not None], self.device)
        if self.settings.offload != "none":
            flats = self._engine.optimizer.fp32_partitioned_groups_flat
            return squared_norm([piece for flat in flats for piece in flat.grad.split(PIECE)], self.device)
        if self.settings.zero == 3:  # all of it in one buffer, whose padding is 0
            return squared_norm(self._engine.optimizer.grad_partitions_flat_buffer.split(PIECE), self.device)
        averaged = self._engine.optimizer.averaged_gradients.values()
        return squared_norm([gradient for group in averaged for gradient in group], self.device)

    def step(self, learning_rate: float, loss: torch.Tensor, square: torch.Tensor) -> None:
        """The optimiser's update with the gradient of the global batch, or none at all where loss or gradient is not `finite`.

        That is decided on the device, and nothing waits for it. Either way the gradient is used up: a step that was not applied is as
        if it had not begun.

        Args:
            learning_rate: of this step.
            loss: of the step, summed over the ranks; a scalar on the device.
            square: of the norm of its gradient, summed over the ranks; a scalar on the device.
        """
        inner, norm = _inner(self._engine), square.sqrt()
        if self.settings.offload != "none":
            loss, norm = loss.cpu(), norm.cpu()  # the CPU updates, and waits for them
        for group in inner.param_groups:
            group["lr"] = learning_rate
        inner.found_inf = (~finite(loss, norm)).float()
        inner.grad_scale = (norm / self.settings.clip).clamp(min=1).float() if self.settings.clip else None
        self._engine.step()

    def average(self, step: int) -> None:
        """Move the averaged weights towards those of a step (from 1) that was applied."""
        if self._masters:  # a small model may leave nothing to the last of many ranks
            for kind, kept in self.settings.decays(step).items():
                torch._foreach_lerp_(self._averages[kind], self._masters, 1 - kept)

    def end(self) -> None:
        """Let DeepSpeed let go of what it holds; nothing else may be asked for then."""
        self._engine.destroy()

    def fill(self, module: nn.Module) -> nn.Module:
        """Give a module of the stage, made like the one that is trained, the weights and buffers of now; collective. Returns it."""
        parameters = dict(self.stage.named_parameters())
        divided = [parameter for parameter in parameters.values() if not getattr(parameter, "ds_persist", False)]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(divided, enabled=self.settings.zero == 3):
            for name, parameter in parameters.items():
                module.get_parameter(name).data = parameter.detach().clone()
        for name, buffer in self.stage.named_buffers():
            module.get_buffer(name).data = buffer.detach().clone()
        return module

    def held(self) -> Iterator[Fragment]:
        """All that this rank holds of the training state; whoever writes into it calls `resume` next."""
        for index, (name, shape, start, master, moments) in enumerate(self._owned):
            averages = {kind: each[index] for kind, each in self._averages.items()}
            yield Fragment(name, shape, start, {"master": master, **moments, **averages})

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the training state, each element of the model owned by exactly one rank."""
        for index, fragment in enumerate(self.held()):
            if self.settings.zero > 0 or index % self._ranks == self._rank:  # without ZeRO every rank holds everything
                yield fragment

    def resume(self, steps: int) -> None:
        """Go on from what was written into `held` on every rank; collective.

        Args:
            steps: optimiser steps already taken (Adam's bias correction).
        """
        for state in _inner(self._engine).state.values():
            state["step"].fill_(steps)
        _push_masters(self._engine)


@contextmanager
def last_of(ranks: int) -> Iterator[None]:
    """In this context the process is the last of so many ranks, whose collectives do nothing: for engines on tensors without memory.

    The last one holds most: under ZeRO-1 and 2 its part ends with padding, for which DeepSpeed copies its gradients once more.
    """
    coordinator, usual = "deepspeed.runtime.zero.partitioned_param_coordinator", get_accelerator()
    with (
        warnings.catch_warnings(action="ignore"),  # DeepSpeed asks where tensors lie
        patch.object(sys, "excepthook", sys.excepthook),  # a group of torch sets its own
        patch.dict(os.environ, LOCAL_RANK="0"),  # DeepSpeed insists
        patch(f"{coordinator}.assert_ints_same_as_other_ranks"),  # would read values
        patch.object(nn.Module, "_apply", lambda module, *_, **__: module),  # everything is where it belongs
    ):
        groups._release_process_group_references()  # of an engine that this process had in a group that is gone
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
        try:
            set_accelerator(CPU_Accelerator())
            yield
        finally:
            set_accelerator(usual)
            torch.distributed.destroy_process_group()
            groups._release_process_group_references()


def bucket_elements(sizes: Sequence[int], overlapped: bool) -> int:
    """Elements of a bucket, of a model whose parameters have so many each.

    It is allocated anew for each backward: one larger than the model would cost more than the backward itself. Beside the backward
    (overlapped) it has room for the largest parameter: DeepSpeed lets go of a gradient that has none before it is reduced.
    """
    wanted = max(BUCKET, max(sizes)) if overlapped else BUCKET
    return -(-min(wanted, sum(sizes)) // ALIGNED) * ALIGNED


def _deepspeed_config(settings: EngineSettings, sizes: Sequence[int], device: torch.device) -> dict[str, Any]:
    overlapped = device.type == "cuda" and torch.distributed.get_world_size() > 1
    bucket = bucket_elements(sizes, overlapped)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches may differ from rank to rank
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": 0.0,  # the update itself clips, by a norm that is known
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": settings.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT,
            "overlap_comm": overlapped,
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in each micro-batch
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": list(settings.betas),
                "eps": 1e-8,
                "weight_decay": settings.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if settings.offload != "none":
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's has the mask, and needs no compiler
        config["zero_optimization"] |= {"offload_optimizer": host} | ({"offload_param": host} if settings.offload == "all" else {})
    if settings.zero in (1, 2):
        config["zero_optimization"]["compute_grad_norm"] = False
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _give_memory(stage: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Make parameters on the device, whose values do not count yet; ZeRO-3 divides each among the ranks before there is the next."""
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    divided = config["zero_optimization"]["stage"] == 3
    shared = torch.zeros(max(p.numel() for p in stage.parameters()) if divided else 0, dtype=dtype, device=device)

    def one_by_one(recurse: bool = True) -> Iterator[nn.Parameter]:
        for layer in stage.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                # What is divided lets go of its memory; that of the largest serves all, for malloc would keep holes of every size.
                memory = shared[: parameter.numel()] if divided else torch.zeros(parameter.numel(), dtype=dtype, device=device)
                layer._parameters[name] = given = nn.Parameter(memory.view(parameter.shape), parameter.requires_grad)
                yield given

    if divided:
        usual, stage.parameters = stage.parameters, one_by_one  # type: ignore[method-assign]
        deepspeed.zero.Init(module=stage, config_dict_or_path=config, dtype=dtype)
        stage.parameters = usual  # type: ignore[method-assign]
    else:
        for _ in one_by_one():
            pass
    stage.to(device)  # buffers


def _compile(stage: nn.Module) -> None:
    """Have the first step compile forward and backward; a full share has the dropout of an uncompiled step."""
    torch._inductor.config.fallback_random = True
    torch._inductor.config.deterministic = True  # or it times kernels on a GPU, and takes the one that was faster this time
    stage.compile(dynamic=False)


def _assert_triton_builds() -> None:
    """Triton, which makes a GPU's kernels, compiles what starts them when it is first used; without this that fails in the first step.

    Raises:
        ValueError: if there is no C compiler, or no header of this Python.
    """
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        lacking = "no C compiler"
    elif not header.exists():
        lacking = f"no {header}"
    else:
        return
    raise ValueError(f"workers.compile=true on GPUs, but host {platform.node()} has {lacking}: install gcc and python3-dev, or unset it")


def _filled(batch: Tensors, items: int) -> Tensors:
    """A batch with as many items as the compiled one, those that were lacking of zeros and weight 0.

    For another shape it would be compiled again, in the midst of training, which would pass for a hang.
    """
    lacking = items - len(batch["weight"])
    return {name: torch.cat((value, value.new_zeros(lacking, *value.shape[1:]))) for name, value in batch.items()} if lacking else batch


def _zero_or_nothing(engine: deepspeed.DeepSpeedEngine, _: torch.optim.Optimizer) -> str | None:
    """Which class of DeepSpeed's wraps the optimiser.

    For ZeRO-1 in bf16 with fp32 sums it has another one, with other private names, that takes the gradient's norm itself; that of ZeRO-2
    does the same without.
    """
    return ZERO_OPTIMIZATION if engine.zero_optimization() else None


deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = _zero_or_nothing


def _free(_: CUDA_Accelerator, device_index: int | None = None) -> int:
    """Bytes that are free on a GPU.

    DeepSpeed asks NVML, for the number that CUDA_VISIBLE_DEVICES gives; a part of a GPU (MIG) has a UUID there.
    """
    return torch.cuda.mem_get_info(device_index)[0]


CUDA_Accelerator.available_memory = _free


def _trim() -> None:
    """Give memory that is free back to the kernel, which glibc does not do of its own accord where it lies between what is not."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _take_over(engine: deepspeed.DeepSpeedEngine, ranks: int) -> None:
    """Leave out what DeepSpeed does of its own accord and we do before: it would wait for the device, and pass over all gradients again."""
    zero = engine.optimizer
    if ranks == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero._get_norm_groups = lambda: [0.0]
        zero.unscale_and_clip_grads = lambda *_: None


def _own(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, tuple[int, ...], int, torch.Tensor, dict[str, torch.Tensor]]]:
    """(name, shape, start, fp32 view, moments) of each stretch this rank holds, at any ZeRO stage; the same for good."""
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_id"):  # ZeRO-3: a padded, evenly cut flat buffer
            zero = p._z3_optimizer
            group, offset, length = zero.grad_position[zero.get_param_id(p)]
            flat, start = zero.fp32_partitioned_groups_flat[group], length * zero._get_param_partition_rank(p)
            count = max(0, min(length, p.ds_numel - start))
            if count:
                moments = {m: zero.optimizer.state[flat][m].narrow(0, offset, count) for m in MOMENTS}
                yield name, tuple(p.ds_shape), start, flat.narrow(0, offset, count), moments
        elif hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2: a parameter may lie on several ranks, or not on this one
            if (mapping := p._hp_mapping) is not None:
                yield name, tuple(p.shape), mapping.lp_fragment_address.start, mapping.hp_fragment, dict(mapping.optim_fragment)
        else:
            state = engine.optimizer.state[p]
            yield name, tuple(p.shape), 0, p.data.view(-1), {m: state[m].view(-1) for m in MOMENTS}


def _inner(engine: deepspeed.DeepSpeedEngine) -> Any:
    """Torch's AdamW, below DeepSpeed's optimiser."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which it compares every optimiser with, without compiling it: two seconds of each start of a rank."""
    compile_of_torch = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_of_torch


def _make_adam_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Adam's state comes into being at the first step; make it now, so that it can be read and restored."""
    inner, zero = _inner(engine), engine.optimizer
    flats = (
        getattr(zero, "fp32_partitioned_groups_flat", None)
        or getattr(zero, "single_partition_of_fp32_groups", None)
        or [p for group in inner.param_groups for p in group["params"]]
    )
    for flat in flats:
        if not inner.state.get(flat):
            inner.state[flat] = {"step": torch.zeros((), device=flat.device), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _push_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy the fp32 masters into the weights the next forward uses; collective."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := getattr(zero, "persistent_parameters", None):
            persistent[0].partition(persistent)  # what is gathered already would stay what it was
            persistent[0].all_gather(persistent)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
