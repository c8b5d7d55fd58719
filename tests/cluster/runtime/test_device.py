"""How fast a device could be, by the name that CUDA gives it."""

import pytest
import torch

from cluster.runtime.device import peak_flops

PEAKS = {
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0.0,
    "NVIDIA GeForce RTX 9090": 0.0,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_card_s_peak_is_that_of_its_kind_and_not_known_of_others_and_of_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == PEAKS[name]
    assert peak_flops(torch.device("cpu"), "bf16") == 0
