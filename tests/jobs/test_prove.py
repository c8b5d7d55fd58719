"""jobs/prove.py where it would touch a user's cluster."""

from pathlib import Path

import pytest

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
