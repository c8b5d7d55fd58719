"""The figures of a card, on a machine that has none and little else; here at widths of nothing, and on the CPU."""

import json
import os
from pathlib import Path

import pytest

from cluster.bench.card import PARTS
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
    assert not [part for part, figures in found.items() if "failed" in figures], found
    assert all(figures and "seconds of this part" in figures for part, figures in found.items() if part != "machine")
    assert all(error < 1e-5 for name, error in found["parity"].items() if "error" in name)
    kinds = [name.split(", ")[2] for name in found["engines"] if "ZeRO" in name]
    assert (kinds.count("fp32"), kinds.count("bf16")) == (8, 6)
    assert all(same for name, same in found["twice"].items() if name.endswith(("fp32", "bf16")))
    assert (tmp_path / "card.md").read_text().strip() in done.stdout
    refused = job("bench", "gpu", *config, "--only", "parity,speed", check=False)
    assert refused.returncode == 1 and "--only names speed, but the parts are parity, engines," in refused.stderr
