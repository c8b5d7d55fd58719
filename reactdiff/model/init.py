"""Initial weights as a function of (seed, parameter name): the order in which modules are built does not matter."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutput

from reactdiff.data.keyed import generator
from reactdiff.model.layers import StartsAtZero


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draws every parameter anew from PyTorch's default distribution for its layer.

    Linear and convolution: U(-b, b) with b = 1 / sqrt(fan in), weight and bias (He et al., 2015, as PyTorch sets it). Packed
    projections of attention: Glorot uniform; the biases before and after attention 0. Norms: 1 and 0. What starts at zero stays at zero.
    Recurrent cells: U(-b, b) with b = 1 / sqrt(state). Embeddings: uniform, with the variance 1 of PyTorch's normal.

    Raises:
        TypeError: if a layer is of a kind that has no rule here.
    """
    for path, layer in module.named_modules():
        bounds = _bounds(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in bounds:
                raise TypeError(f"initialise has no rule for {path}.{name} of {type(layer).__name__}; add one to reactdiff/model/init.py")
            _draw(parameter, bounds[name], seed, f"{path}.{name}" if path else name)


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


def _draw(parameter: Tensor, bound: float | None, seed: int, name: str) -> None:
    if not bound:
        parameter.fill_(bound is None)
        return
    unit = generator(seed, "weights", name).random(tuple(parameter.shape), dtype=np.float32)
    parameter.copy_(torch.from_numpy(unit).mul_(2).sub_(1).mul_(bound))
