"""Which items of a step are not finite by themselves: each is computed once more, alone, with the weights of now."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.data.quarantine import BadItem
from cluster.data.reader import Reader
from cluster.data.stream import Batch, Share
from cluster.training.agreement import Verdict
from cluster.training.gradient import LARGEST_NORM, NonFinite, Tensors, squared_norm
from cluster.training.job import Job, Place
from reactdiff.data.order import Order
from reactdiff.stage import Stage, empty_batch


def examine(module: nn.Module, batch: Tensors, items: int, seed: int) -> dict[int, str]:
    """What is wrong with the items of a batch.

    Args:
        module: the stage with its weights, without an engine around it; its gradients are lost.
        batch: tensors of some items, with a `weight` of 0 or 1 for each; those of weight 0 are not looked at.
        items: the denominator of the loss, so that an item weighs what it weighs in its step.
        seed: of dropout, anew for each item; its masks are not those of the step, which are for all its items together.

    Returns:
        row -> "its loss is ..." or "its gradient has norm ...", of those that have either.
    """
    wrong = {}
    for row in torch.nonzero(batch["weight"]).flatten().tolist():
        torch.manual_seed(seed)
        module.zero_grad()
        loss = module({name: tensor[row : row + 1] for name, tensor in batch.items() if name != "weight"}).sum() / items
        if not torch.isfinite(loss):
            wrong[row] = f"its loss is {float(loss.detach())}"
            continue
        loss.backward()
        norm = math.sqrt(squared_norm([p.grad for p in module.parameters() if p.grad is not None], loss.device))
        if not norm <= LARGEST_NORM:
            wrong[row] = f"its gradient has norm {norm:.3g}"
    return wrong


class Examiner:
    """Finds the items of a step that are to blame for it. All ranks call it together.

    Args:
        job: what is trained.
        place: this rank.
        kind: the stage.
        reader: knows the items' names.
        order: which items a step has.
        share: of each step, this rank's.
        gather: collects one object of every rank on all of them.
    """

    def __init__(self, job: Job, place: Place, kind: Stage, reader: Reader, order: Order, share: Share, gather: Callable[[Any], list[Any]]):
        self._job, self._device, self._kind = job, place.device, kind
        self._reader, self._order, self._share, self._gather = reader, order, share, gather

    def to_blame(self, module: nn.Module, batch: Batch, verdict: Verdict, seed: int) -> list[BadItem]:
        """The items of a step that are not finite by themselves, the same on every rank.

        Where items of zeros, or all of the step's, are not finite either, it is the weights: to quarantine what such weights
        cannot take would go on until no data are left.

        Args:
            module: the stage with the weights of now.
            batch: this rank's share of the step.
            verdict: what became of the step.
            seed: of dropout.

        Raises:
            NonFinite: if there are none, or the run is to stop at them.
        """
        valid = sum(self._gather(batch.valid))
        wrong = examine(module, {name: tensor.to(self._device) for name, tensor in batch.tensors.items()}, valid, seed)
        mine = []
        for row, why in wrong.items():
            item = self._item(batch, row)
            mine.append(BadItem(item, batch.positions[row], f"{self._reader.named(item // 2)}: {why} in step {batch.step}"))
        zeros = empty_batch(self._kind, 1, str(self._device)) | {"weight": torch.ones(1)}
        found, zeros_wrong = zip(*self._gather((mine, examine(module, zeros, 1, seed))), strict=True)
        bad = sorted(itertools.chain(*found), key=lambda bad: bad.position)
        if any(zeros_wrong) or len(bad) == valid > 1:
            raise self._error(batch, verdict, "no single item is to blame: with the weights of now, none is finite alone")
        if not bad:
            raise self._error(batch, verdict, "no single item is to blame: each has a finite loss and gradient alone")
        if self._job.experiment.data.on_corrupt == "stop":
            raise self._error(batch, verdict, "", bad)
        return bad

    def _item(self, batch: Batch, row: int) -> int:
        """The item of a row that is not finite; where its target is another's and holds what is no number, that one."""
        finite = all(batch.tensors[name][row].isfinite().all() for name in self._kind.targets())
        return batch.items[row] if finite else batch.targets[row]

    def _error(self, batch: Batch, verdict: Verdict, why: str, bad: Sequence[BadItem] = ()) -> NonFinite:
        data = f"split {self._job.experiment.data.split} of {self._job.dataset.url}"
        items = self._order.at(np.arange(*self._share.bounds(batch.step))).tolist()
        blame = "; ".join(f"item {one.item} (clip {one.item // 2}, side {one.item % 2} of {data}; {one.why})" for one in bad)
        return NonFinite(
            f"step {batch.step} of stage {self._job.stage} was not applied: its loss is {verdict.loss}, the norm of its gradient "
            f"{verdict.gradient_norm} (at most {LARGEST_NORM:g} can be). "
            + (
                f"To blame is {blame}. Mend the data, or go on without with data.on_corrupt=quarantine"
                if blame
                else f"Of its items {items} (clip = item // 2, side = item % 2) of {data}, {why}. "
                "Lower optim.lr or set optim.clip, in a run of another name (run.name)"
            ),
            [one.item for one in bad],
        )
