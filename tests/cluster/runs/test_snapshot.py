"""What is copied is the safetensors file that their own library reads, and the memory serves again."""

import torch
from safetensors.torch import load

from cluster.runs.snapshot import TYPES, TensorSnapshot


def some(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    every = {f"of {kind}": (torch.rand(3, 5, generator=generator) * 9).to(kind) for kind in TYPES}
    return {**every, "part@7/master": torch.rand(1001, generator=generator), "none": torch.zeros(0), "number": torch.tensor(4.0)}


def test_the_copy_is_the_file_that_safetensors_reads() -> None:
    tensors, snapshot = some(0), TensorSnapshot()
    read = load(bytes(snapshot.take(tensors)))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_equal_tensors_are_equal_bytes_in_whatever_order_they_come_and_the_memory_is_used_again() -> None:
    snapshot, other = TensorSnapshot(), TensorSnapshot()
    snapshot.take(some(1))
    first = snapshot._memory
    taken = snapshot.take(some(2))
    assert snapshot._memory is first
    assert bytes(taken) == bytes(other.take(dict(reversed(some(2).items()))))


def test_what_changes_afterwards_does_not_change_the_copy() -> None:
    tensors = some(3)
    taken = TensorSnapshot().take(tensors)
    before = bytes(taken)
    tensors["part@7/master"].zero_()
    assert bytes(taken) == before


def test_memory_that_was_prepared_is_what_the_first_copy_goes_to_and_other_tensors_get_another_file() -> None:
    snapshot = TensorSnapshot()
    snapshot.prepare(some(4))
    prepared = snapshot._memory
    snapshot.take(some(5))
    assert snapshot._memory is prepared
    more = some(5) | {"part@7/master": torch.rand(1002), "another": torch.ones(2)}
    read = load(bytes(snapshot.take(more)))
    assert read.keys() == more.keys() and all(torch.equal(read[name], more[name]) for name in more)


def test_weights_that_are_trained_are_copied_without_a_graph() -> None:
    weight, snapshot = torch.nn.Parameter(torch.ones(3)), TensorSnapshot()
    for _ in range(2):
        assert torch.equal(load(bytes(snapshot.take({"w": weight})))["w"], torch.ones(3))
    assert not snapshot._views["w"].requires_grad
