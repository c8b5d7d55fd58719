"""A trial that needs an autoencoder which another trains waits for it, and trains it no second time."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import load
from cluster.data.manifest import Split
from cluster.runs.lease import Held
from cluster.studies import first_stage as module
from cluster.studies.first_stage import first_stage, train_first_stage
from cluster.telemetry.display import Display
from tests.cluster.studies.test_sweep import dataset


def test_who_is_at_the_autoencoder_is_waited_for_and_it_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "shards", train=Split())
    experiment = first_stage(load(None, [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"]), "study")
    assert experiment is not None
    looks, waited = iter([False, False, False, True]), list[float]()
    begun: list[Any] = []

    def execute(*given: Any, wait: bool) -> None:
        begun.append(given)
        assert not wait
        if len(begun) < 3:
            raise Held("another driver is at it")

    monkeypatch.setattr(module, "finished", lambda *_: next(looks))
    monkeypatch.setattr(module, "execute", execute)
    with Display() as display:
        train_first_stage(experiment, display, "a trial", waited.append)
    assert len(begun) == 3 and len(waited) == 2, "held, held, and then it was its own turn"
    assert begun[0][2] == ("autoencoder", "latents")
