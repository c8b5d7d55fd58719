"""One stage of training under DeepSpeed ZeRO: the gradient of the global batch, the update, averaged weights (EMA), the state by fragments.

DeepSpeed's own checkpoints are not used: they load at no other number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cluster.training.compile import filled
from cluster.training.gradient import Tensors, finite, squared_norm
from cluster.training.settings import EngineSettings
from cluster.training.zero import adamw, gathered, gradients, push_masters, stretches, wrap
from reactdiff.model.init import Weights


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
        self.settings, self.device = settings, device
        self._cached = False
        self._ranks, self._rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self._engine = wrap(stage, settings, device)
        self._owned = list(stretches(self._engine))
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
            micro_batch = filled(micro_batch, self.settings.compile_for)
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
        """Backward of what `forward` returned; DeepSpeed averages over micro-batches, and may over ranks, so undo that."""
        self._engine.backward(part * (self.settings.micro_batches * (self._ranks if self.settings.averages else 1)))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def gradient_square(self) -> torch.Tensor:
        """Squared norm of this rank's part of the step's gradient, before clipping, after the last `backward` of a step.

        Each element of the global batch's gradient is counted by exactly one rank, so the sum over the ranks is the square
        of its norm. It is not finite where an element is not. A float64 on the device: nothing waits for it.
        """
        mine = list(gradients(self._engine, self.settings))
        if self.settings.zero == 0:  # every rank holds everything
            mine = mine[self._rank :: self._ranks]
        return squared_norm([gradient for gradient in mine if gradient is not None], self.device)

    def step(self, learning_rate: float, loss: torch.Tensor, square: torch.Tensor) -> None:
        """The optimiser's update with the gradient of the global batch, or none at all where loss or gradient is not `finite`.

        That is decided on the device, and nothing waits for it. Either way the gradient is used up: a step that was not applied is as
        if it had not begun.

        Args:
            learning_rate: of this step.
            loss: of the step, summed over the ranks; a scalar on the device.
            square: of the norm of its gradient, summed over the ranks; a scalar on the device.
        """
        optimizer, norm = adamw(self._engine), square.sqrt()
        if self.settings.offload != "none":
            loss, norm = loss.cpu(), norm.cpu()  # the CPU updates, and waits for them
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.found_inf = (~finite(loss, norm)).float()
        optimizer.grad_scale = (norm / self.settings.clip).clamp(min=1).float() if self.settings.clip else None
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
        with torch.no_grad(), gathered(parameters.values(), self.settings):
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
        for state in adamw(self._engine).state.values():
            state["step"].fill_(steps)
        push_masters(self._engine)
