"""Batches that are copied beside the step before, in the order in which a GPU is told so; on a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.training.ahead import Ahead

CUDA = torch.device("cuda")


class Stream:
    """A stream that tells what it is asked."""

    def __init__(self, name: str, log: list[str]):
        self.name, self._log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class Pinned:
    """A tensor in host memory, or its copy."""

    def __init__(self, name: str, log: list[str], on: list[str]):
        self.name, self._log, self._on = name, log, on

    def to(self, device: torch.device, non_blocking: bool) -> "Pinned":
        assert device == CUDA and non_blocking
        self._log.append(f"{self._on[-1]} copies {self.name}")
        return Pinned(f"copy of {self.name}", self._log, self._on)

    def record_stream(self, stream: Stream) -> None:
        self._log.append(f"{stream.name} uses {self.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """What a pretended GPU is told, and the streams that it is told on."""
    log, on = list[str](), ["main"]
    side, main = Stream("side", log), Stream("main", log)

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        on.append(stream.name)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    return log, on


def batch(step: int, *tensors: Pinned) -> Any:
    return SimpleNamespace(step=step, tensors={tensor.name: tensor for tensor in tensors})


def test_a_batch_is_copied_on_a_stream_of_its_own_that_is_waited_for_and_its_memory_is_not_given_away_meanwhile(
    told: tuple[list[str], list[str]],
) -> None:
    log, on = told
    ahead, coming = Ahead(CUDA), batch(0, Pinned("x", log, on), Pinned("y", log, on))
    ahead.copy(coming)
    assert log == ["side copies x", "side copies y"]
    assert [one.name for one in ahead.take(coming).values()] == ["copy of x", "copy of y"]  # type: ignore[attr-defined]
    assert log[2:] == ["main waits for side", "main uses copy of x", "main uses copy of y"]


def test_a_batch_that_has_changed_is_copied_again_and_one_whose_step_is_over_is_let_go(told: tuple[list[str], list[str]]) -> None:
    log, on = told
    ahead = Ahead(CUDA)
    before, after = batch(3, Pinned("x", log, on)), batch(3, Pinned("x without an item", log, on))
    ahead.copy(before)
    ahead.copy(after)
    assert [one.name for one in ahead.take(after).values()] == ["copy of x without an item"]  # type: ignore[attr-defined]
    ahead.drop(after)
    with pytest.raises(KeyError):
        ahead.take(after)
