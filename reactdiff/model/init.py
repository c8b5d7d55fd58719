"""Initial weights as a function of (seed, parameter name): the order in which modules are built does not matter."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutput

from reactdiff.data.keyed import generator
from reactdiff.model.layers import StartsAtZero

Weights = Callable[[str], Tensor]
"""Parameter name -> its values, float32 on the CPU, made when they are asked for: one at a time, a large model needs little memory."""


def initial_weights(module: nn.Module, seed: int) -> Weights:
    """What every parameter begins with, drawn from PyTorch's default distribution for its layer.

    Linear and convolution: U(-b, b) with b = 1 / sqrt(fan in), weight and bias (He et al., 2015, as PyTorch sets it). Packed
    projections of attention: Glorot uniform; the biases before and after attention 0. Norms: 1 and 0. What starts at zero stays at zero.
    Recurrent cells: U(-b, b) with b = 1 / sqrt(state). Embeddings: uniform, with the variance 1 of PyTorch's normal.

    Args:
        module: whose names and shapes count; its parameters need no memory.
        seed: of all of them.

    Raises:
        TypeError: if a layer is of a kind that has no rule here.
    """
    rules: dict[str, tuple[tuple[int, ...], float | None]] = {}
    for path, layer in module.named_modules():
        bounds = _bounds(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in bounds:
                raise TypeError(f"initialise has no rule for {path}.{name} of {type(layer).__name__}; add one to reactdiff/model/init.py")
            rules[f"{path}.{name}" if path else name] = tuple(parameter.shape), bounds[name]
    return lambda name: _draw(*rules[name], seed, name)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Gives every parameter its `initial_weights`.

    Raises:
        TypeError: as `initial_weights`.
    """
    weights = initial_weights(module, seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(weights(name))


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules that are made here have their parameters on the device "meta"; their buffers are what they are."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad))

    with patch.object(nn.Module, "register_parameter", without_memory):
        yield


def _bounds(layer: nn.Module) -> dict[str, float | None]:
    """Parameter name -> b of U(-b, b); None for the ones of a norm."""
    match layer:
        case nn.LayerNorm() | nn.GroupNorm():
            return {"weight": None, "bias": 0}
        case StartsAtZero():
            return {"weight": 0, "bias": 0}
        case AttentionOutput():
            return {"weight": 1 / math.sqrt(layer.in_features), "bias": 0}
        case nn.Linear() | nn.Conv1d():
            return dict.fromkeys(("weight", "bias"), 1 / math.sqrt(layer.weight[0].numel()))
        case nn.MultiheadAttention():
            return {"in_proj_weight": math.sqrt(6 / (4 * layer.embed_dim)), "in_proj_bias": 0}
        case nn.GRUCell():
            return dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), 1 / math.sqrt(layer.hidden_size))
        case nn.Embedding():
            return {"weight": math.sqrt(3)}
    return {}


def _draw(shape: tuple[int, ...], bound: float | None, seed: int, name: str) -> Tensor:
    if not bound:
        return torch.full(shape, float(bound is None))
    unit = generator(seed, "weights", name).random(shape, dtype=np.float32)
    return torch.from_numpy(unit).mul_(2).sub_(1).mul_(bound)
