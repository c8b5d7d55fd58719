"""A trial that needs an autoencoder which another trains waits for it, and trains it no second time."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import load
from cluster.config.schema import Experiment
from cluster.data.manifest import Split
from cluster.driver.interruption import Enough
from cluster.runs.lease import Held
from cluster.studies import first_stage as module
from cluster.studies.first_stage import first_stage, train_first_stage
from cluster.telemetry.display import Display
from tests.cluster.studies.test_sweep import dataset


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    dataset(tmp_path / "shards", train=Split())
    found = first_stage(load(None, [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"]), "study")
    assert found is not None
    return found


def test_who_is_at_the_autoencoder_is_waited_for_and_it_is_trained_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, waited = iter([False, False, False, True]), list[float]()
    begun: list[Any] = []

    def execute(*given: Any, wait: bool, enough: Any) -> None:
        begun.append((*given, enough))
        assert not wait
        if len(begun) < 3:
            raise Held("another driver is at it")

    def enough() -> str:
        return ""

    monkeypatch.setattr(module, "finished", lambda *_: next(looks))
    monkeypatch.setattr(module, "execute", execute)
    with Display() as display:
        train_first_stage(experiment, display, enough, waited.append)
    assert len(begun) == 3 and len(waited) == 2, "held, held, and then it was its own turn"
    assert begun[0][2] == ("autoencoder", "latents") and begun[0][-1] is enough, "who trains it is asked, too"


def test_told_to_end_a_trial_waits_for_no_autoencoder(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*_: Any, **__: Any) -> None:
        raise Held("another driver is at it")

    waited, reasons = list[float](), iter(["", "the sweep was told to end"])
    monkeypatch.setattr(module, "execute", execute)
    with Display() as display, pytest.raises(Enough, match="told to end"):
        train_first_stage(experiment, display, lambda: next(reasons), waited.append)
    assert len(waited) == 1
