"""What a bench of training works on: a group of its device, and data as datasets have them."""

import pytest
import torch
import torch.distributed as dist

from cluster.bench.training import alone, random_batch
from cluster.config.schema import Experiment
from reactdiff.data.sample import SIMULATED
from reactdiff.stage import Source, stages_over, stored_batch


def test_a_bench_on_the_cpu_needs_no_nccl_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    alone(torch.device("cpu"))
    try:
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_noise_has_the_types_of_a_dataset_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, generator: drawn.append(shape[0]) or randn(shape, generator=generator))
    experiment = Experiment.model_validate({"model": {"acoustic": ["mfcc"]}})
    for kind in stages_over(Source(SIMULATED, 100), experiment.model, experiment.diffusion).values():
        batch, stored = random_batch(kind, 3, torch.device("cpu")), stored_batch(kind, 3, "cpu")
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()
        }
        assert torch.float16 in {tensor.dtype for tensor in batch.values()}
        assert all(tensor[0].equal(tensor[2]) for tensor in batch.values())
    assert set(drawn) == {1}
