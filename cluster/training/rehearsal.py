"""A step of a rank on tensors without memory, under the real engine: what it would hold, activations and DeepSpeed's buffers included."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cluster.training.engine import Engine
from cluster.training.settings import EngineSettings
from cluster.training.zero import last_of
from reactdiff.stage import Stage, build_without_memory, stored_batch

MAPPED = 32 << 20
"""Bytes from which on glibc maps memory for a tensor alone and gives it back with it. Of smaller ones it keeps the pages."""

HOLES = 0.3
"""Bytes of those pages that lie between what is alive, for each byte that small tensors take at most in a step; measured."""

COPIED = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
"""Collectives for which gloo makes a copy of the larger tensor."""


@dataclass(frozen=True)
class StepMemory:
    """Most bytes that the tensors of a rank take while it trains, but for its batches.

    Attributes:
        living: those that are there at one time; what a GPU's allocator calls allocated.
        resident: of a process on a CPU, where small tensors that are gone leave their pages behind.
    """

    living: int
    resident: int


def rehearse(kind: Stage, settings: EngineSettings, ranks: int, items: int, gpu: bool = False) -> StepMemory:
    """Build a rank's engine and have it take a step, without memory and without the other ranks.

    Args:
        kind: the stage.
        settings: of the engine.
        ranks: how many there would be; this process must be in no group of torch.distributed.
        items: of the largest micro-batch.
        gpu: whether it would compute on one.
    """
    # A third micro-batch holds no more than the second; what is compiled is taken to hold what its parts do.
    settings = replace(settings, micro_batches=min(settings.micro_batches, 2), compile_for=0)
    with last_of(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        batch = stored_batch(kind, items, "cpu") | {"weight": torch.ones(items)}
        with _Counting(batch.values()) as counting:
            module = build_without_memory(kind)
            if gpu:
                _without_dropout_of_attention(module)
            shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
            engine = Engine(module, lambda name: torch.empty(shapes[name]), settings, torch.device("cpu"))
            counting.begin_steps()
            for _ in range(2 if settings.zero == 3 else 1):  # ZeRO-3 knows from its first step what to gather beforehand
                _step(engine, batch, items)
            engine.end()
    return StepMemory(counting.living, counting.resident)


def _without_dropout_of_attention(module: nn.Module) -> None:
    """Attention on a CPU keeps all of its weights where it has dropout; on a GPU it does not."""
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0.0


def _step(engine: Engine, batch: dict[str, torch.Tensor], items: int) -> None:
    loss = torch.zeros(())
    for _ in range(engine.settings.micro_batches):
        part = engine.forward(batch, items)
        engine.backward(part)
        loss += part.detach()
    engine.step(0.0, loss, engine.gradient_square())
    engine.average(1)


class _Counting(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being while it is on, until they are gone.

    Args:
        there: tensors that were there before.
    """

    def __init__(self, there: Iterable[torch.Tensor]):
        super().__init__()
        self.living = self.resident = 0
        self._small = self._large = self._kept = self._lasting = 0
        self._holes = 0.0
        self._known = weakref.WeakSet[Any](tensor.untyped_storage() for tensor in there)

    def begin_steps(self) -> None:
        """What is there now stays; glibc was asked to let go of the rest."""
        self._kept = self._lasting = self._small
        self._holes = HOLES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in COPIED:
            copy = max(tensor.nbytes for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor))
            self.resident = max(self.resident, self._pages() + copy)
        made = func(*args, **(kwargs or {}))
        tensors = (tensor for tensor in tree_iter(made) if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta")
        for memory in (tensor.untyped_storage() for tensor in tensors):
            if memory not in self._known:
                self._known.add(memory)
                self._count(memory.nbytes())
                weakref.finalize(memory, self._count, -memory.nbytes())
        return made

    def _count(self, change: int) -> None:
        if abs(change) < MAPPED:
            self._small += change
            self._kept = max(self._kept, self._small)
        else:
            self._large += change
        self.living = max(self.living, self._small + self._large)
        self.resident = max(self.resident, self._pages())

    def _pages(self) -> int:
        return self._large + self._kept + int(self._holes * (self._kept - self._lasting))
