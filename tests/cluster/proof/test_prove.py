"""The verdict of a proof, and how a configuration is shortened; runs under real faults are in tests/cluster/multihost/ and chaos/."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.config.loading import changed
from cluster.driver.pin import stage_end
from cluster.proof.comparison import Endured, Trace, compare_traces, faults_table
from cluster.proof.disturbed_run import DisturbedRun, NotInjected
from cluster.proof.experiment import CHECKPOINT, Case
from cluster.proof.prove import Proof, Prover
from cluster.proof.script import FAULT_KINDS, kind_name
from cluster.proof.site import DrivenHosts, HostsSite, Site
from cluster.runtime.faults import Fault
from cluster.runtime.machines import PATH
from cluster.storage import content_hash, open_store
from cluster.telemetry.display import Display
from tests.cluster.support import pretend
from tests.cluster.support.multihost import leftovers, requires_namespaces
from tests.tiny import OVERRIDES, ROOT

WITHOUT = ROOT / "tests/cluster/support/without_ray"
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
    assert told.prove({0: ["kill", "s3_30s"]}) == 0
    assert said.getvalue().rstrip().endswith("PROVEN") and "NOT" not in said.getvalue()
    assert len(told.tried) == 1


def test_other_weights_give_exit_code_1_and_the_shortest_script_that_fails(case: Case) -> None:
    said = io.StringIO()
    assert Told(case, said, altered=["stop"]).prove({0: ["kill", "s3_30s", "stop", "kill_driver"]}) == 1
    text = said.getvalue()
    assert "weights: NOT identical (autoencoder xx and not aa)" in text
    assert "autoencoder, positions 0 to 5: 9 and not 1" in text and "\nNOT PROVEN\n" in text
    assert text.splitlines()[-1].startswith("the shortest script that fails: stop of rank")


def test_a_run_that_is_lost_is_not_proven(case: Case) -> None:
    said = io.StringIO()
    told = Told(case, said, lost=["drain"])
    assert told.prove({0: ["drain"]}) == 1
    assert "the run was lost: nothing was heard of it\nNOT PROVEN" in said.getvalue()
    assert told.tried == [["drain"]], "one fault cannot be shortened"


def test_scripts_of_several_seeds_are_proven_one_by_one(case: Case) -> None:
    said = io.StringIO()
    told = Told(case, said, lost=["drain"])
    assert told.prove({0: ["kill"], 1: ["drain"], 2: ["stop"]}) == 1
    assert told.tried == [["kill"], ["drain"], ["stop"]], "one that fails does not hide the next"
    assert said.getvalue().rstrip().endswith("PROVEN: seeds 0, 2; NOT PROVEN: 1")


def test_a_fault_that_never_came_proves_nothing(case: Case) -> None:
    said = io.StringIO()

    class Never(Told):
        def attempt(self, faults: Sequence[Fault]) -> Proof:
            raise NotInjected("the run was at its end before kill came")

    assert Never(case, said).prove({0: ["kill"]}) == 1
    assert said.getvalue().rstrip().endswith("the run was at its end before kill came\nNOT PROVEN")


def test_a_configuration_is_shortened_to_so_many_steps(case: Case) -> None:
    overrides = case.shortened({"autoencoder": 120, "diffusion": 77})
    short = changed(case.experiment, overrides)
    ends = {stage: math.ceil(stage_end(short, stage, case.manifest) / short.optim.batch[stage]) for stage in case.stages}
    assert ends == {"autoencoder": 120, "diffusion": 77}
    assert short.run.checkpoint_every["diffusion"] == CHECKPOINT * short.optim.batch["diffusion"] and short.run.log_every == 1


def test_a_dataset_that_is_too_large_to_be_copied_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.proof.experiment.LARGEST", 1000)
    with pytest.raises(ValueError, match=r"lies in memory: at most .* Prove it on a part of the data"):
        Case.read(ROOT / "jobs/configs/demo.yaml", [*OVERRIDES, f"data.url={shards}"], copied=True)


@dataclass(frozen=True)
class Pretended(Case):
    """A case of drivers that train nothing, in one stage."""

    stages = (pretend.STAGE,)
    batches = {pretend.STAGE: pretend.BATCH}  # noqa: RUF012

    def command(self, steps: Mapping[str, int], site: Site) -> list[str]:
        return ["python", "-m", "tests.cluster.support.pretend", site.store, site.data, site.targets, str(steps[pretend.STAGE])]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[HostsSite]:
    """Hosts without Ray, and a shard."""
    requires_namespaces()
    hosts = DrivenHosts(tmp_path / "hosts", 1, environment={"PATH": f"{WITHOUT}:{PATH}"}, disk="64m")
    with hosts, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.store_environment().items():
            patch.setenv(name, value)
        site = HostsSite(hosts, tmp_path)
        data = open_store(site.data)
        data.put("shard.tar", b"shard")
        data.put("hash", content_hash(b"shard").encode())
        yield site
    assert leftovers(hosts) == []


@pytest.mark.starts
def test_hosts_are_laid_out_as_the_shipped_cluster(site: HostsSite) -> None:
    shipped = (ROOT / "ray_config.yaml").read_text()
    assert site.hosts and {"RAY_gcs_storage=rocksdb", "RAY_gcs_rpc_server_reconnect_timeout_s=3600;"} <= set(shipped.split())
    head, worker, driver = site.hosts.head.environment, site.hosts.workers[0].environment, site.machines[0]
    assert head["RAY_gcs_storage"] == "rocksdb" and "RAY_gcs_storage" not in worker
    assert {one["RAY_gcs_rpc_server_reconnect_timeout_s"] for one in (head, worker, driver.environment)} == {"3600"}
    assert driver.name == "driver" and driver not in site.hosts.all, "no rank lands there"


def disturbed_run_of(case: Case, site: Site, steps: int) -> DisturbedRun:
    pretended = Pretended(case.config, case.overrides, case.experiment, case.dataset, case.manifest)
    return DisturbedRun(pretended, {pretend.STAGE: steps}, site, "disturbed", Display(io.StringIO()))


def script_of(*kinds: str) -> list[Fault]:
    """Each kind, in this order, 60 steps apart."""
    every = [(30 + 60 * number, FAULT_KINDS[kind]) for number, kind in enumerate(kinds)]
    return [Fault(kind.does, step, pretend.STAGE, 0, kind.seconds) for step, kind in every]


def ledgers(steps: int) -> dict[int, float]:
    """Of a run that nothing happened to, by progress."""
    return {step * pretend.BATCH: step for step in range(1, steps + 1)}


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_what_a_run_gets_over_by_itself_and_what_takes_the_same_command(site: HostsSite, case: Case) -> None:
    disturbed = disturbed_run_of(case, site, steps=660)
    trace = disturbed.run(script_of("kill", "kill_driver", "wrong_bytes", "second_driver", "frozen_driver"))
    print(faults_table(disturbed.endured))
    assert {progress: ledger for progress, (ledger, _) in trace.rows[pretend.STAGE].items()} == ledgers(660)
    assert [(kind_name(one.fault), one.how) for one in disturbed.endured] == [
        ("kill", "by itself"),
        ("kill_driver", "same command (killed)"),
        ("wrong_bytes", "same command (exit code 1)"),
        ("second_driver", "by itself"),
        ("frozen_driver", "same command (while the first stood still)"),
    ]
    assert all(one.going < math.inf for one in disturbed.endured)
    assert all(one.noticed < math.inf for one in disturbed.endured if one.fault.kind != "second_driver")


@pytest.mark.timeout(300)
@pytest.mark.starts
def test_a_run_that_trains_on_other_items_after_a_fault_is_not_the_same(site: HostsSite, case: Case) -> None:
    whole = Trace({pretend.STAGE: pretend.HASH}, {pretend.STAGE: {at: (ledger, 1.0) for at, ledger in ledgers(160).items()}})
    site.machines[0].environment["WRONG_ROWS"] = "1"
    same = compare_traces(whole, disturbed_run_of(case, site, steps=160).run(script_of("kill")), placement=True)
    assert not same.proven and "autoencoder, positions" in same.sentences[2]


@pytest.mark.timeout(300)
@pytest.mark.starts
def test_a_script_that_comes_too_late_says_nothing(site: HostsSite, case: Case) -> None:
    with pytest.raises(NotInjected, match="the run was at its end before kill came, due at step 10000"):
        disturbed_run_of(case, site, steps=40).run([Fault("kill", 10_000, pretend.STAGE)])
