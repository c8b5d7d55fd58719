"""How large a model is, part by part."""

from collections import Counter

from torch import nn

DEPTH = 2


def parameters_by_module(module: nn.Module) -> list[tuple[str, int]]:
    """Number of parameters of each part, in the model's order; a part is named by the first two steps of its path."""
    counts: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        counts[".".join(name.split(".")[:-1][:DEPTH])] += parameter.numel()
    return list(counts.items())
