"""DeepSpeed ZeRO as it is used here, and the private names through which a rank reaches its own stretches of the training state.

The only module that knows DeepSpeed, whose private names are those of 0.19.8, which the project pins.
"""

import ctypes
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.training.compile import compile_step
from cluster.training.settings import MOMENTS, EngineSettings
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

PIECE = 1 << 20
"""Elements of which a norm is taken in fp32; norms are summed in fp64."""

PERSISTENT = 100_000
"""Parameters with fewer elements are not divided by ZeRO-3: to gather each for itself would cost more than they weigh."""


def wrap(stage: nn.Module, settings: EngineSettings, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """A stage under DeepSpeed, with memory on the device for its weights, which have no values yet, and for Adam's state."""
    if device.type == "cpu":
        if get_accelerator().device_name() != "cpu":  # outside workers it takes a GPU wherever there is one
            set_accelerator(CPU_Accelerator())
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute
        os.environ.setdefault("LOCAL_SIZE", "1")  # or ZeRO-3 asks numactl, a process, at each of its reductions
    else:
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # where DeepSpeed computes; among more than ten GPUs Ray counts otherwise
    deepspeed.utils.logger.setLevel(logging.WARNING)
    groups._WORLD_GROUP = torch.distributed.group.WORLD  # or it makes another one: a second communicator, with a timeout that is not ours
    _import_muon()
    config = deepspeed_config(settings, [p.numel() for p in stage.parameters()], device)
    if settings.recompute:
        recompute(stage)
    if settings.compile_for:
        compile_step(stage, device)
    _give_memory(stage, config, device)
    engine, *_ = deepspeed.initialize(
        model=stage,
        model_parameters=[p for p in stage.parameters() if p.requires_grad],
        config=config,
        dist_init_required=False,
    )
    _take_over(engine)
    _trim()  # DeepSpeed has moved what was divided
    _make_adam_state(engine)
    return engine


def gradients(engine: deepspeed.DeepSpeedEngine, settings: EngineSettings) -> Iterator[torch.Tensor | None]:
    """What this rank holds of the gradient after the last backward of a step: its part; without ZeRO all of it, a parameter each."""
    zero = engine.optimizer
    if settings.zero == 0:
        yield from (p.grad for p in engine.module.parameters() if p.requires_grad)
    elif settings.offload != "none":
        yield from (piece for flat in zero.fp32_partitioned_groups_flat for piece in flat.grad.split(PIECE))
    elif settings.zero == 3:  # all of it in one buffer, whose padding is 0
        yield from zero.grad_partitions_flat_buffer.split(PIECE)
    else:
        yield from itertools.chain(*zero.averaged_gradients.values())


def gathered(parameters: Iterable[nn.Parameter], settings: EngineSettings) -> AbstractContextManager[None]:
    """In this context parameters are whole on every rank; collective."""
    divided = [parameter for parameter in parameters if not getattr(parameter, "ds_persist", False)]
    return deepspeed.zero.GatheredParameters(divided, enabled=settings.zero == 3)


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


def deepspeed_config(settings: EngineSettings, sizes: Sequence[int], device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, for a model whose parameters have so many elements each."""
    overlapped = device.type == "cuda" and torch.distributed.get_world_size() > 1
    bucket = bucket_elements(sizes, overlapped)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches may differ from rank to rank
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": 0.0,  # the update itself clips, by a norm that is known
        "communication_data_type": "fp32",
        "gradient_allreduce_op": "mean" if settings.averages else "sum",
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


def _take_over(engine: deepspeed.DeepSpeedEngine) -> None:
    """Leave out what DeepSpeed does of its own accord and we do before: it would wait for the device, and pass over all gradients again."""
    zero = engine.optimizer
    if torch.distributed.get_world_size() == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero._get_norm_groups = lambda: [0.0]
        zero.unscale_and_clip_grads = lambda *_: None


def stretches(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, tuple[int, ...], int, torch.Tensor, dict[str, torch.Tensor]]]:
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


def adamw(engine: deepspeed.DeepSpeedEngine) -> Any:
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
    inner, zero = adamw(engine), engine.optimizer
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


def push_masters(engine: deepspeed.DeepSpeedEngine) -> None:
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
