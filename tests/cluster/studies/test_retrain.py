"""Ticks that overlap; tests/jobs/test_retrain.py runs whole ones."""

from pathlib import Path

import pytest

from cluster.data.manifest import Manifest, publish
from cluster.runs import lease
from cluster.runs.lease import LEASE, Lease
from cluster.storage import open_store
from tests.tiny import call


def test_of_ticks_that_overlap_the_second_one_says_who_works_and_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LOOK", 0.05)
    (tmp_path / "retrain.yaml").write_text("name: faces")
    publish(open_store(str(tmp_path / "shards")), Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={}))
    store = open_store(f"{tmp_path}/store/registry/faces")
    command = ["--config", tmp_path / "retrain.yaml", f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"]
    with Lease(store, "the first one"):
        second = call("retrain", *command)
        assert f"{store.url} is held by host " in second.stdout and "(the first one), which is at work there" in second.stdout
        assert [entry.key for entry in store.list()] == [LEASE]
    alone = call("retrain", *command, check=False)
    assert "has no split gate" in alone.stderr, "and when the first one has ended, the next one works"
