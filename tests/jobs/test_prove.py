"""jobs/prove.py where it would touch a user's cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.support.machines import Running, machines
from tests.tiny import ROOT, call, settings


@pytest.fixture
def on_cluster(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """RAY_ADDRESS is set, and the user says no; returns what was asked."""
    asked: list[str] = []

    def refuse(question: str) -> str:
        asked.append(question)
        return "n"

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr("builtins.input", refuse)
    return asked


def command(shards: Path, store: Path, *more: str) -> list[str]:
    return ["--config", str(ROOT / "jobs/configs/demo.yaml"), *more, *settings(shards, store)]


def test_on_a_cluster_it_lists_what_it_will_do_and_asks_first(shards: Path, tmp_path: Path, on_cluster: list[str]) -> None:
    done = call("prove", *command(shards, tmp_path / "store", "--kinds", "kill,second_driver"), check=False)
    assert done.returncode == 1 and on_cluster == ["go on? [y/N] "]
    assert "on the cluster 192.0.2.1:6379, to runs of this command and to nothing else:" in done.stdout
    assert f"objects in {tmp_path}/store/proofs/" in done.stdout
    assert "a rank gets SIGKILL (rank" in done.stdout and "the same command is given a second time" in done.stdout
    assert not (tmp_path / "store").exists(), "nothing was written"


def test_on_a_cluster_no_kind_is_taken_that_needs_root(shards: Path, tmp_path: Path, on_cluster: list[str]) -> None:
    done = call("prove", *command(shards, tmp_path / "store", "--kinds", "kill,power_off"), check=False)
    assert done.returncode == 1 and "power_off needs hosts that this command has made itself" in done.stderr
    assert on_cluster == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_cluster_it_proves_its_own_runs_and_touches_no_other(shards: Path, tmp_path: Path) -> None:
    with machines(3) as there:
        there.wait(3)
        other = Running(shards, tmp_path / "other", "other", "workers.count=1", "optim.epochs=400", address=there.address)
        other.until(lambda: other.progress >= 240)
        environment = os.environ | {"RAY_ADDRESS": there.address, "RAY_AUTH_MODE": "disabled"}
        words = command(shards, tmp_path / "store", "--kinds", "kill,stop,kill_driver", "--yes")
        environment.pop("RAY_AUTH_TOKEN", None)
        done = subprocess.run([sys.executable, str(ROOT / "jobs/prove.py"), *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert other.process.poll() is None, "it went on beside all of it"
        other.process.send_signal(signal.SIGINT)
        assert other.end() == 130, other.said
    assert "\nPROVEN\n" in done.stdout and "weights: identical" in done.stdout
    assert other.attempts == 1 and "starting the ranks again" not in other.said, f"none of its processes was touched:\n{other.said}"
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {"proofs", "latents"}, "objects only below proofs/"
