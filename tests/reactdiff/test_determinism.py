"""What of torch is switched where equal inputs are to give equal bits, and a GPU the precision that was asked for."""

import pytest
import torch
import torch.utils.deterministic

from reactdiff.determinism import make_deterministic


def test_a_gpu_adds_no_parts_of_a_product_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        make_deterministic(torch.get_num_threads())
        assert matmul.allow_bf16_reduced_precision_reduction is False
    finally:
        torch.set_deterministic_debug_mode("default")
        matmul.allow_bf16_reduced_precision_reduction = before
