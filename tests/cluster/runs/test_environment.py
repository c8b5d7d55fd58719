"""What is kept of the process that runs a life: enough to repeat it, and no secret."""

import json
import sys

import pytest

from cluster.config.loading import load
from cluster.runs import environment


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("data.url=s3://key:secret@bucket/shards", "data.url=s3://***@bucket/shards"),
        ("run.store=s3://key:se/cr@et@bucket/store", "run.store=s3://***@bucket/store"),
        ("data.url=https://user@host:9000/x", "data.url=https://***@host:9000/x"),
        ("https://host/shards?X-Amz-Signature=secret&X-Amz-Date=1#x", "https://host/shards?***"),
        ("model.init_from=[s3://a:secret@b/c,s3://d:secret@e/f]", "model.init_from=[s3://***@b/c,s3://***@e/f]"),
        ("--redis-password=secret", "--redis-password=***"),
        ("data.url=s3://bucket/people@home/shards", "data.url=s3://bucket/people@home/shards"),
        ("optim.lr=1e-4", "optim.lr=1e-4"),
        ("jobs/train.py", "jobs/train.py"),
    ],
)
def test_a_life_keeps_its_command_without_the_secrets_of_its_urls(word: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", word])
    monkeypatch.setattr(environment, "_revision", lambda: "")
    facts = json.dumps(environment.environment(load(None)))
    assert json.loads(facts)["command"] == ["jobs/train.py", kept] and "secret" not in facts + environment.command()


def test_a_machine_without_git_starts_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert environment.environment(load(None))["git"] == ""
