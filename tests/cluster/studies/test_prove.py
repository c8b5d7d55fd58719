"""The verdict of a proof, and how a configuration is shortened; runs under real faults are in tests/cluster/multihost/ and chaos/."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.config.loading import changed
from cluster.driver.pin import stage_end
from cluster.runtime.faults import Fault
from cluster.studies.prove import CHECKPOINT, Case, Proof, Prover
from cluster.studies.script import kind_name
from cluster.studies.verdict import Endured, Trace, compare_traces
from cluster.telemetry.display import Display
from tests.tiny import OVERRIDES, ROOT

WHOLE = Trace({"autoencoder": "aa"}, {"autoencoder": {6: (1.0, 2.0)}})


@pytest.fixture
def case(shards: Path) -> Case:
    return Case.read(ROOT / "jobs/configs/demo.yaml", [*OVERRIDES, f"data.url={shards}"], copied=True)


class Told(Prover):
    """A prover whose disturbed runs are lost or altered by the kinds a test says."""

    def __init__(self, case: Case, said: io.StringIO, lost: Sequence[str] = (), altered: Sequence[str] = ()):
        super().__init__(case, Path("nowhere"), Display(said))
        self.lost, self.altered = lost, altered
        self.tried: list[list[str]] = []

    def _undisturbed(self) -> float:
        return 1.0

    def attempt(self, faults: Sequence[Fault]) -> Proof:
        names = [kind_name(fault) for fault in faults]
        self.tried.append(names)
        endured = [Endured(fault, "h1", fault.step, "seen", 1.0, 2.0, 6, "by itself") for fault in faults]
        if any(name in self.lost for name in names):
            return Proof(endured[:1], None, "nothing was heard of it")
        other = Trace({"autoencoder": "xx"}, {"autoencoder": {6: (9.0, 2.0)}})
        return Proof(endured, compare_traces(WHOLE, other if any(name in self.altered for name in names) else WHOLE, placement=True))


def test_a_run_that_gets_over_its_script_is_proven(case: Case) -> None:
    said = io.StringIO()
    told = Told(case, said)
    assert told.prove(0, ["kill", "s3_30s"]) == 0
    assert said.getvalue().rstrip().endswith("PROVEN") and "NOT" not in said.getvalue()
    assert len(told.tried) == 1


def test_other_weights_give_exit_code_1_and_the_shortest_script_that_fails(case: Case) -> None:
    said = io.StringIO()
    assert Told(case, said, altered=["stop"]).prove(0, ["kill", "s3_30s", "stop", "kill_driver"]) == 1
    text = said.getvalue()
    assert "weights: NOT identical (autoencoder xx and not aa)" in text
    assert "autoencoder, positions 0 to 5: 9 and not 1" in text and "\nNOT PROVEN\n" in text
    assert text.splitlines()[-1].startswith("the shortest script that fails: stop of rank")


def test_a_run_that_is_lost_is_not_proven(case: Case) -> None:
    said = io.StringIO()
    told = Told(case, said, lost=["drain"])
    assert told.prove(0, ["drain"]) == 1
    assert "the run was lost: nothing was heard of it\nNOT PROVEN" in said.getvalue()
    assert told.tried == [["drain"]], "one fault cannot be shortened"


def test_a_configuration_is_shortened_to_so_many_steps(case: Case) -> None:
    overrides = case.shortened({"autoencoder": 120, "diffusion": 77})
    short = changed(case.experiment, overrides)
    ends = {stage: math.ceil(stage_end(short, stage, case.manifest) / short.optim.batch[stage]) for stage in case.stages}
    assert ends == {"autoencoder": 120, "diffusion": 77}
    assert short.run.checkpoint_every["diffusion"] == CHECKPOINT * short.optim.batch["diffusion"] and short.run.log_every == 1


def test_a_dataset_that_is_too_large_to_be_copied_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.studies.prove.LARGEST", 1000)
    with pytest.raises(ValueError, match=r"lies in memory: at most .* Prove it on a part of the data"):
        Case.read(ROOT / "jobs/configs/demo.yaml", [*OVERRIDES, f"data.url={shards}"], copied=True)
