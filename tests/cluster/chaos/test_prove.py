"""jobs/prove.py with five kinds of faults that the seed chooses, on hosts of namespaces."""

from pathlib import Path

import pytest

from cluster.proof.script import choose_kinds
from tests.cluster.multihost.test_prove import assert_proven, prove

# Alone: its hosts are more processes than two cores bear beside others.
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(3600)]


def test_five_kinds_of_faults_of_two_seeds_change_nothing(shards: Path) -> None:
    said = prove(shards, "--seed", "0,1")
    first, second = said.split("script of seed 1:")
    assert_proven(first, choose_kinds("", 0, hosts=True))
    assert_proven(second, choose_kinds("", 1, hosts=True))
