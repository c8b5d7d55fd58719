"""jobs/prove.py with five kinds of faults that the seed chooses, on hosts of namespaces."""

from pathlib import Path

import pytest

from cluster.studies.script import choose_kinds
from tests.cluster.multihost.test_prove import assert_proven, prove

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("seed", [0, 1])
def test_five_kinds_of_faults_change_nothing(seed: int, shards: Path) -> None:
    assert_proven(prove(shards, "--seed", str(seed)), choose_kinds("", seed, hosts=True))
