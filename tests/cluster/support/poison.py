"""Items whose loss or gradient is no number, wherever and however often they are computed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.data.reader import Reader
from cluster.storage import open_store
from reactdiff.clip import PERSONS
from reactdiff.model.autoencoder import Autoencoder


class Poison(torch.autograd.Function):
    """The identity on losses; their gradients are multiplied by factors."""

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class Dose(NamedTuple):
    """What an item's loss, and its gradient, are multiplied by."""

    loss: float = 1.0
    gradient: float = 1.0


@contextmanager
def poisoned_items(experiment: Experiment, doses: Mapping[int, Dose]) -> Iterator[None]:
    """In this process, stage 1 computes no numbers of these items; as long as they are in `doses`.

    They are told by the bytes of `mfcc` that it reads of them.
    """
    store = open_store(experiment.data.url)
    reader, forward = Reader(store, load_manifest(store), experiment.data.split), Autoencoder.forward
    marks = {
        item: torch.from_numpy(reader.read(item // 2, [(PERSONS[item % 2], "mfcc")]).arrays[PERSONS[item % 2], "mfcc"]) for item in doses
    }

    def poisoned(self: Autoencoder, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = forward(self, batch)
        if losses.is_meta:  # its operations are counted
            return losses
        factors = torch.ones(2, len(losses))
        for item, dose in doses.items():
            factors[:, (batch["mfcc"] == marks[item]).flatten(1).all(1)] = torch.tensor(dose)[:, None]
        return Poison.apply(torch.where(factors[0] == 1, losses, losses * factors[0]), factors[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Autoencoder, "forward", poisoned)
        yield
