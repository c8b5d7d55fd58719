"""DeepSpeed ZeRO around one stage of training: gradients of the global batch, fp32 master state by fragments, EMA.

The only module that knows DeepSpeed, including the private names through which a rank reaches its own fragments of the
fp32 weights and of Adam's state; they are those of DeepSpeed 0.19.8, which the project pins. DeepSpeed's own checkpoints
are not used: they load at no other number of ranks.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.config.schema import Experiment

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime import compiler

ALIGNED = 1024  # DeepSpeed wants buckets that divide evenly
BUCKET = 50 * 1024 * ALIGNED
"""Most elements that are reduced or gathered in one collective."""

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS, "average")
"""What a checkpoint keeps of each parameter: fp32 weight, Adam's two moments, averaged weight (EMA)."""

LARGEST_NORM = 1e19
"""Of a gradient that may be applied. Adam keeps the squares in fp32, where those of a larger one are infinite, and stay so.

Of smaller ones no update moves a weight by more than about ten learning rates, which are finite: weights stay finite.
"""

Tensors = dict[str, torch.Tensor]


class NonFinite(RuntimeError):
    """A loss or gradient is not a number any more; says of which step, and which of its items are to blame."""

    failure = "non_finite"


def squared_norm(gradients: Sequence[torch.Tensor]) -> float:
    """Sum of the squares of all elements, not finite if one of them is not."""
    parts = [gradient for gradient in gradients if gradient.numel()]
    if not parts:
        return 0.0
    return float(torch.stack(torch._foreach_norm(parts, 2, torch.float32)).double().square().sum())


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


def engine_settings(experiment: Experiment, stage: str, ranks: int) -> EngineSettings:
    """How an experiment trains a stage on so many ranks."""
    optim, workers = experiment.optim, experiment.workers
    whole_share = -(-optim.batch[stage] // workers.most) if workers.least < workers.most else 0
    return EngineSettings(
        zero=workers.zero,
        precision=optim.precision,
        micro_batches=micro_batches(optim.batch[stage], ranks, workers.micro_batch or whole_share),
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        ema=optim.ema[stage],
    )


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
        tensors: kind (see KINDS) -> (count,) view.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]


class Engine:
    """One rank's part in training a stage, a module whose forward maps a batch to one loss per item.

    Args:
        stage: the module, equally initialised on every rank; torch.distributed must be initialised.
        settings: how to train.
        device: where this rank computes.
    """

    def __init__(self, stage: nn.Module, settings: EngineSettings, device: torch.device):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute
        deepspeed.utils.logger.setLevel(logging.WARNING)
        _import_muon()
        self.settings, self.device = settings, device
        self._ranks, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        initial = {name: parameter.detach().float().cpu().clone() for name, parameter in stage.named_parameters()}
        self._engine, *_ = deepspeed.initialize(
            model=stage.to(device),
            model_parameters=[p for p in stage.parameters() if p.requires_grad],
            config=_deepspeed_config(settings, sum(p.numel() for p in stage.parameters())),
            dist_init_required=False,
        )
        _make_adam_state(self._engine)
        self._average = {(name, start): view.detach().clone() for name, _, start, view, _ in self._own()}
        # A bf16 engine takes its masters from rounded weights; give every stage and precision the same fp32 start.
        self.restore(lambda name, at, count: dict.fromkeys(("master", "average"), initial[name].reshape(-1)[at : at + count]), steps=0)

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
        weight = micro_batch["weight"]
        losses = self._engine({name: value for name, value in micro_batch.items() if name != "weight"})
        return (losses * weight).sum() / max(items, 1)

    def backward(self, part: torch.Tensor) -> None:
        """Backward of what `forward` returned; DeepSpeed averages over ranks and micro-batches, so undo that."""
        self._engine.backward(part * (self._ranks * self.settings.micro_batches))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def gradient_square(self) -> float:
        """Squared norm of this rank's part of the step's gradient, before clipping, after the last `backward` of a step.

        Each element of the global batch's gradient is counted by exactly one rank, so the sum over the ranks is the square
        of its norm. It is not finite where an element is not.
        """
        if self.settings.zero == 0:  # every rank holds everything
            gradients = [p.grad for p in self.stage.parameters() if p.requires_grad][self._rank :: self._ranks]
            return squared_norm([gradient for gradient in gradients if gradient is not None])
        if self.settings.zero == 3:  # all of it in one buffer, whose padding is 0
            return squared_norm(self._engine.optimizer.grad_partitions_flat_buffer.split(ALIGNED * ALIGNED))
        return squared_norm([gradient for group in self._engine.optimizer.averaged_gradients.values() for gradient in group])

    def discard(self) -> None:
        """Instead of `step`, throw away the gradient: what follows is as if the step had not begun."""
        engine, zero = self._engine, self._engine.optimizer
        engine.micro_steps -= engine.micro_steps % self.settings.micro_batches
        if self.settings.zero == 0:
            engine.zero_grad()
            return
        zero.zero_grad()
        zero.averaged_gradients.clear()
        if self.settings.zero == 3:
            zero.grad_partitions_flat_buffer.zero_()  # where a parameter's gradient stays until another comes

    def step(self, learning_rate: float) -> None:
        """The optimiser's update with the gradient of the global batch, then the averaged weights'.

        Raises:
            NonFinite: if DeepSpeed did not apply it, as it does of its own accord where a norm is not finite; weights are as before.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if not self._engine.was_step_applied():
            raise NonFinite("DeepSpeed skipped an update whose gradient was finite before; nothing of it was applied. Same command")
        with torch.no_grad():
            for name, _, start, master, _ in self._own():
                self._average[name, start].lerp_(master, 1 - self.settings.ema)

    def fill(self, module: nn.Module) -> nn.Module:
        """Give a module of the stage, made like the one that is trained, the weights and buffers of now; collective. Returns it."""
        parameters = dict(self.stage.named_parameters())
        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=self.settings.zero == 3):
            for name, parameter in parameters.items():
                module.get_parameter(name).data = parameter.detach().clone()
        for name, buffer in self.stage.named_buffers():
            module.get_buffer(name).data = buffer.detach().clone()
        return module

    def extents(self) -> list[tuple[str, int, int]]:
        """(name, first element, count) of every stretch this rank holds and `restore` sets."""
        return [(name, start, master.numel()) for name, _, start, master, _ in self._own()]

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the training state, each element of the model owned by exactly one rank."""
        for index, (name, shape, start, master, moments) in enumerate(self._own()):
            if self.settings.zero > 0 or index % self._ranks == self._rank:  # without ZeRO every rank holds everything
                yield Fragment(name, shape, start, {"master": master, **moments, "average": self._average[name, start]})

    def restore(self, read: Callable[[str, int, int], dict[str, torch.Tensor]], steps: int) -> None:
        """Set this rank's state; collective.

        Args:
            read: (name, start, count) -> kind -> (count,) fp32 tensors; kinds it leaves out become 0.
            steps: optimiser steps already taken (Adam's bias correction).
        """
        with torch.no_grad():
            for name, _, start, master, moments in self._own():
                saved = read(name, start, master.numel())
                views = {"master": master, **moments, "average": self._average[name, start]}
                for kind, view in views.items():
                    view.copy_(saved[kind]) if kind in saved else view.zero_()
        for state in _inner(self._engine).state.values():
            if torch.is_tensor(state["step"]):
                state["step"].fill_(steps)
            else:
                state["step"] = steps
        _push_masters(self._engine)

    def _own(self) -> Iterator[tuple[str, tuple[int, ...], int, torch.Tensor, dict[str, torch.Tensor]]]:
        """(name, shape, start, fp32 view, moments) of each stretch this rank holds, at any ZeRO stage."""
        for name, p in self._engine.module.named_parameters():
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
                state = self._engine.optimizer.state[p]
                yield name, tuple(p.shape), 0, p.data.view(-1), {m: state[m].view(-1) for m in MOMENTS}


def _deepspeed_config(settings: EngineSettings, parameters: int) -> dict[str, Any]:
    # A bucket is allocated anew for each backward: one larger than the model would cost more than the backward itself.
    bucket = min(BUCKET, -(-parameters // ALIGNED) * ALIGNED)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches may differ from rank to rank
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": settings.clip,
        "zero_optimization": {
            "stage": settings.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": list(settings.betas),
                "eps": 1e-8,
                "weight_decay": settings.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if settings.zero in (1, 2) and not settings.clip:
        config["zero_optimization"]["compute_grad_norm"] = False  # it is known before the update
    if settings.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return config


def _inner(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
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
            inner.state[flat] = {"step": torch.tensor(0.0), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _push_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Copy the fp32 masters into the weights the next forward uses; collective."""
    zero = engine.optimizer
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        for group in range(len(zero.fp16_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if getattr(zero, "persistent_parameters", None):
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
