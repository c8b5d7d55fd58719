"""The figures of a card, on a machine that has none and little else; here at widths of nothing, and on the CPU."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from cluster.bench import card_page, card_parts
from cluster.bench.card import Card
from cluster.bench.card_page import measure_card
from cluster.bench.card_parts import ENGINES, PARTS, batches, engines, longest
from tests.tiny import OVERRIDES, ROOT, job

PATH = f"{ROOT / 'tests/cluster/support/bare'}:{ROOT}"
"""With it nothing is found of Ray, boto3, webdataset, prometheus_client and others."""


@pytest.mark.slow
def test_all_parts_are_measured_where_hardly_anything_is_installed_and_each_is_kept(tmp_path: Path) -> None:
    tiny = (*OVERRIDES, "workers.micro_batch=1", "evaluation.predictions=1")
    config = ("--config", ROOT / "jobs/configs/demo.yaml", "--out", tmp_path, "--steps", "1")
    done = job("bench", "gpu", *config, *tiny, env=os.environ | {"PYTHONPATH": PATH})
    found = json.loads((tmp_path / "card.json").read_text())
    assert list(found) == ["machine", *PARTS] and found["machine"]["torch"]
    assert "failed" not in json.dumps(found), found
    assert all(figures and "seconds of this part" in figures for part, figures in found.items() if part != "machine")
    assert all(error < 1e-5 for name, error in found["parity"].items() if "error" in name)
    kinds = [name.split(", ")[2] for name in found["engines"] if "ZeRO" in name]
    assert (kinds.count("fp32"), kinds.count("bf16")) == (8, 6)
    assert all(figure["planned, GB"] > 0 for name, figure in found["engines"].items() if "ZeRO" in name)
    assert all(same for name, same in found["twice"].items() if name.endswith(("fp32", "bf16")))
    assert (tmp_path / "card.md").read_text().strip() in done.stdout
    refused = job("bench", "gpu", *config, "--only", "parity,speed", check=False)
    assert refused.returncode == 1 and "--only names speed, but the parts are parity, engines," in refused.stderr


PRETENDED: Any = SimpleNamespace(device=torch.device("cuda"))
"""What `measure_card` asks of a card itself."""


def test_each_figure_is_written_when_it_is_known_also_of_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def failing(_: Card) -> Iterator[tuple[str, Any]]:
        yield "first", 1.0
        written.append(json.loads((tmp_path / "card.json").read_text())["failing"])
        yield "first", 2.0
        raise RuntimeError("no more")

    monkeypatch.setattr(card_page, "_machine", lambda _: {})
    monkeypatch.setattr(card_page, "PARTS", {"failing": failing, "next": lambda _: iter([("third", {"ms": 3.0})])})
    found = measure_card(PRETENDED, ["failing", "next"], tmp_path, lambda *_: None)
    assert written == [{"first": 1.0}] and found == json.loads((tmp_path / "card.json").read_text())
    assert (found["failing"]["first"], found["failing"]["failed"], found["next"]["third"]) == (2.0, "RuntimeError: no more", {"ms": 3.0})


def test_a_card_is_told_with_all_that_decides_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="a card", total_memory=80e9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(card_page, "driver_version", lambda: "570.1")
    found = card_page._machine(PRETENDED)
    assert found.items() >= {"driver": "570.1", "cudnn": 91002, "nccl": "2.27.5", "torch": version("torch")}.items()
    assert found["device"].startswith("a card, 80 GB, CUDA ") and "triton" in card_page.PACKAGES


def test_after_ten_minutes_no_other_figure_is_begun_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(_: Card) -> Iterator[tuple[str, Any]]:
        for number in range(9):
            now[0] += 250.0
            yield f"{number}", number

    monkeypatch.setattr(card_page.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(card_page, "_machine", lambda _: {})
    monkeypatch.setattr(card_page, "PARTS", {"slow": slow, "next": slow})
    found = measure_card(PRETENDED, ["slow", "next"], tmp_path, lambda *_: None)
    assert list(found["slow"])[:3] == ["0", "1", "2"] and "`--only slow` measures the rest" in found["slow"]["not measured"]
    assert list(found["next"]) == ["not measured", "seconds of this part"]


class Small:
    """A card with room for four items, and for weights of two bytes."""

    device = SimpleNamespace(type="cuda")
    kinds = {"autoencoder": None}  # noqa: RUF012
    planned = {("autoencoder", *one): 2 for one in ENGINES}  # noqa: RUF012

    def items(self, _: str) -> int:
        return 1

    @contextmanager
    def engine(self, stage: str, zero: int, precision: str, **_: object) -> Iterator[None]:
        if precision != "bf16":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof many")
        yield

    def step(self, _: object, stage: str, items: int) -> int:
        if items > 4:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return items

    def seconds(self, work: int, repeats: int = 0) -> float:
        return 1.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("flops_per_item", "peak_flops", "peak_memory"):
        monkeypatch.setattr(card_parts, name, lambda *_: 1.0)
    return Small()


def test_the_largest_batch_is_found_whatever_says_that_memory_is_full(small: Any) -> None:
    assert {name: figure["items"] for name, figure in batches(small)} == {"autoencoder": 4, "autoencoder, recompute": 4}


def test_a_configuration_that_does_not_fit_is_told_and_the_next_one_is_measured_beside_its_plan(small: Any) -> None:
    found = dict(engines(small))
    failed = [
        name for name, figure in found.items() if figure == "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    ]
    assert len(failed) == 8 and all("32, ZeRO-" in name for name in failed)
    assert [figure["held / planned"] for name, figure in found.items() if name not in failed] == [0.5] * 3


def event(key: str, where: DeviceType, device: float, host: float = 1.0, named: bool = False) -> SimpleNamespace:
    """A row of a profile, three calls."""
    return SimpleNamespace(
        key=key, device_type=where, self_device_time_total=device, self_cpu_time_total=host, is_user_annotation=named, count=3
    )


def test_a_profile_counts_kernels_once_and_not_again_with_what_started_them() -> None:
    on_host = [event("aten::mm", DeviceType.CPU, 30.0, host=3.0), event("Optimizer.step", DeviceType.CPU, 10.0)]
    on_card = [event("gemm", DeviceType.CUDA, 30.0, 0.0), event("adam", DeviceType.CUDA, 10.0, 0.0)]
    region = event("Optimizer.step", DeviceType.CUDA, 12.0, 0.0, named=True)
    assert longest([*on_host, *on_card, region], cuda=True) == [("gemm", 0.75, 3), ("adam", 0.25, 3)]
    assert longest(on_host, cuda=False) == [("aten::mm", 0.75, 3), ("Optimizer.step", 0.25, 3)]
