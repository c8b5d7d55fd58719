"""The plain way to the official metrics is the challenges' own: their code's values on the fixtures."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.bench.challenge import CHALLENGE
from reactdiff.metrics.arrays import load_arrays
from reactdiff.metrics.official import OFFICIAL

DATA = Path(__file__).parents[2] / "data" / "metrics"
EXPECTED = json.loads((DATA / "expected.json").read_text())
NAMES = {"FRCorr": "FRC", "FRDist": "FRD"}


@pytest.mark.parametrize("name", ["m_short", "m_plain"])
def test_the_plain_way_has_the_values_of_the_challenges_code(name: str) -> None:
    arrays = load_arrays(DATA / f"{name}.npz")
    near = [np.flatnonzero(row) for row in arrays["appropriate"]]
    found = {metric: computed(arrays["pred"], arrays["target"], arrays["speaker"], near) for metric, computed in CHALLENGE.items()}
    assert tuple(found) == OFFICIAL
    assert found == {metric: pytest.approx(EXPECTED[name][NAMES.get(metric, metric)], rel=1e-6) for metric in OFFICIAL}
