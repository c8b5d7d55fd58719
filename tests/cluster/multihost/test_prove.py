"""jobs/prove.py: what it says of runs that survive, and of one that does not."""

import re
from pathlib import Path

import pytest

from tests.cluster.support.multihost import CONFIG, requires_namespaces
from tests.tiny import OVERRIDES, job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def prove(shards: Path, *arguments: str) -> str:
    """What the command says, once it has proven it."""
    requires_namespaces()
    done = job("prove", *CONFIG, *arguments, *OVERRIDES, f"data.url={shards}", check=False)
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_proven(said: str, kinds: list[str]) -> None:
    """Every fault has its line, and weights and ledger are those of the undisturbed run."""
    print(said)
    lines = re.findall(r"^\| (\w+) +\| .* \| ((?:by itself|same command).*?) *\|$", said, re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(kinds)
    assert "weights: identical" in said and "ledger: equal" in said and "\nPROVEN\n" in said


@pytest.mark.ci
def test_a_killed_rank_and_a_killed_driver_are_proven_to_change_nothing(tiny_shards: Path) -> None:
    said = prove(tiny_shards, "--kinds", "kill,kill_driver")
    assert_proven(said, ["kill", "kill_driver"])
    assert re.search(r"\| kill_driver .* same command \(killed\)", said) and re.search(r"\| kill  .* by itself", said)
