"""A bench's group of one rank is that of the device it computes on."""

import pytest
import torch
import torch.distributed as dist

from cluster.bench.training import alone


def test_a_bench_on_the_cpu_needs_no_nccl_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    alone(torch.device("cpu"))
    try:
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
