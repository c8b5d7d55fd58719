"""Faults by name: when they come, that they came, and what is told of it."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.runtime import run_watch
from cluster.runtime.faults import Fault, Injected, Injector, at, recovery
from cluster.runtime.hosts import GCS, RAYLET, Hosts
from cluster.runtime.machines import Machine, MachineError
from cluster.runtime.run_watch import Sight, Watch
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter
from tests.cluster.support.multihost import hosts_without_ray, leftovers, soon

pytestmark = [pytest.mark.starts, pytest.mark.timeout(120)]

SLEEP = "import time; time.sleep(600)"
HERE = Machine()


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    yield process
    process.kill()
    process.wait()


class Told(Watch):
    """A watch of a run that tells what the test says."""

    def __init__(self, machines: list[Machine], *sights: Sight):
        super().__init__(lambda: machines, {"autoencoder": 6}, "/nowhere")
        self.coming = list(sights)

    def look(self) -> Sight:
        sight = self.coming.pop(0) if len(self.coming) > 1 else self.coming[0]
        self.history.append(sight)
        return sight


def sight(time: float = 0, step: int = 10, items: int = 60, life: int = 1, restarts: int = 0, **ranks: int) -> Sight:
    """Ranks 0 and 1 are on h1 and h2, or where it is said."""
    places = dict(enumerate(ranks.items())) or {0: ("h1", 1), 1: ("h2", 1)}
    return Sight(time, life, restarts, "autoencoder", step, items, places)


def test_a_fault_is_plain_data() -> None:
    assert at(step=7).kill(rank=1) == Fault("kill", 7, "autoencoder", 1, math.inf)
    assert at(step=9, stage="diffusion").cut(rank=2, seconds=20) == Fault("cut", 9, "diffusion", 2, 20)
    with pytest.raises(AttributeError, match="'explode' is no kind of fault; they are kill, kill_raylet"):
        at(step=1).explode()


def test_a_watch_reads_steps_ranks_and_driver_from_the_endpoint_of_a_run(tmp_path: Path) -> None:
    with closing(Exporter("demo", life=3)) as exporter:
        watch = Watch(lambda: [HERE], {"diffusion": 6}, str(tmp_path))
        assert watch.look() is None
        exporter.write_target(tmp_path)
        assert watch.look() is None, "no rank has told anything"
        for rank in (0, 1):
            meter = Meter(rank, 2, "diffusion")
            meter.gauges["progress_items"] = 45  # seven steps of six items, and a last one of three
            meter.step_done(items=20)
            exporter.update(meter.snapshot())
        exporter.restarts("lost")
        seen = watch.look()
        assert seen is not None
        assert seen[1:] == (3, 1, "diffusion", 8, 40, {0: (HERE.name, os.getpid()), 1: (HERE.name, os.getpid())})
        assert watch.driver() == (HERE, os.getpid()) and watch.process(1) == (HERE, os.getpid())
        assert [watch.look(), watch.look()] and len(watch.history) == 1, "what tells nothing new is not kept"
        exporter.at("diffusion")
        exporter.gone()
        exporter.restarts("lost")
        seen = watch.look()
        assert seen is not None and seen[1:] == (3, 2, "diffusion", 8, 40, {}), "a restart is seen before ranks have told where they are"
        exporter.at("evaluation")
        assert watch.look() is None and watch.driver() == (HERE, os.getpid()), "nothing trains, and the driver answers"
    assert watch.look() is None


def test_a_fault_waits_for_its_step_and_stage(victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_watch, "POLL", 0.0)
    before = [sight(step=step)._replace(ranks={0: (HERE.name, victim.pid)}) for step in range(1, 9)]
    watch = Told([HERE], *before)
    done = Injector(watch).inject(at(step=7).kill())
    assert victim.wait() == -9
    assert (done.before.step, done.host, done.detail) == (7, HERE.name, f"process {victim.pid} of rank 0 is gone")
    with pytest.raises(MachineError, match="did not come to step 9 of stage diffusion; last seen: Sight"):
        monkeypatch.setattr(run_watch, "PATIENCE", 0.01)
        Injector(watch).inject(at(step=9, stage="diffusion").kill())


def test_a_stopped_rank_goes_on_after_its_seconds(victim: subprocess.Popen[bytes]) -> None:
    states = []

    class Looking(Told):
        def look(self) -> Sight:
            states.append(HERE.state(victim.pid)[:1])
            return super().look()

    watch = Looking([HERE], sight()._replace(ranks={0: (HERE.name, victim.pid)}))
    done = Injector(watch).inject(at(step=1).stop(seconds=0.5))
    assert states[0] in "SR" and states[-1] == "T"
    assert HERE.state(victim.pid)[:1] in "SR" and done.time < done.lifted < math.inf


def test_a_fault_for_good_lasts_until_it_is_lifted(victim: subprocess.Popen[bytes]) -> None:
    injector = Injector(Told([HERE], sight()._replace(ranks={0: (HERE.name, victim.pid)})))
    done = injector.inject(at(step=1).stop())
    assert HERE.state(victim.pid)[:1] == "T" and done.lifted == math.inf
    assert injector.lift(done).lifted < math.inf and HERE.state(victim.pid)[:1] in "SR"


def test_a_kind_can_be_added_by_who_knows_more_of_the_run() -> None:
    def shout(injector: Injector, fault: Fault) -> Iterator[tuple[str, str]]:
        yield "here", f"shouted at rank {fault.rank}"

    done = Injector(Told([HERE], sight()), more={"shout": shout}).inject(Fault("shout", 1, rank=1))
    assert (done.host, done.detail) == ("here", "shouted at rank 1")


def test_what_did_not_happen_is_an_error() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    watch = Told([HERE], sight()._replace(ranks={0: (HERE.name, gone.pid)}))
    with pytest.raises(MachineError, match="No such process"):
        Injector(watch).inject(at(step=1).kill())
    with pytest.raises(MachineError, match="does not tell where rank 5 is"):
        watch.process(5)
    with pytest.raises(MachineError, match="needs hosts of namespaces"):
        Injector(watch).inject(at(step=1).cut())


def test_recovery_is_read_from_what_the_run_told() -> None:
    def told(*after: Sight, lifted: float = math.inf) -> tuple[float, float, int]:
        before = sight(time=9, step=10, items=60)
        watch = Told([HERE], before)
        watch.history = [before, *after]
        return recovery(watch, Injected(at(step=10).kill(), "h1", "", before, 10.0, lifted))

    # The group is told to start again after 2 s; its first step, from the checkpoint at step 8, is told after 9 s.
    again = sight(12, 10, 66, restarts=1), sight(15, 8, 66, restarts=1), sight(19, 9, 72, restarts=1)
    assert told(sight(11, 10, 66), *again) == (2, 9, 2)
    # A new driver counts items from 0.
    assert told(sight(20, 0, 0, life=2), sight(25, 8, 0, life=2), sight(30, 9, 6, life=2)) == (10, 20, 2)
    # Nothing was started again: the run stood still until what it waited for came back.
    assert told(sight(11, 11, 66), sight(45, 12, 72), lifted=40.0) == (math.inf, 35, 0)
    assert told() == (math.inf, math.inf, 0)


def test_a_step_may_have_other_items_in_each_stage() -> None:
    watch = Watch(lambda: [HERE], {"autoencoder": 6, "diffusion": 3}, "/nowhere")
    before = sight(time=9, step=10, items=30)._replace(stage="diffusion")
    watch.history = [before, before._replace(time=15, step=9, items=33, restarts=1), before._replace(time=16, step=9, items=36, restarts=1)]
    assert recovery(watch, Injected(at(step=10).kill(), "h1", "", before, 10.0, math.inf)).steps_lost == 2


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_without_ray(tmp_path_factory.mktemp("machines")) as hosts:
        yield hosts
    assert leftovers(hosts) == []


@pytest.fixture
def injector(hosts: Hosts) -> Injector:
    """Of a run whose ranks are process 1 of h1 and h2, which nothing can kill from inside."""
    assert soon(lambda: all(host.processes(f"{RAYLET}|{GCS}") for host in hosts.all))
    return Injector(Told(list(hosts.all), sight()), hosts)


def test_the_raylet_of_a_rank_is_killed(hosts: Hosts, injector: Injector) -> None:
    node = hosts.workers[1].node_id
    done = injector.inject(at(step=1).kill_raylet(rank=1))
    assert done.host == "h2" and node in done.detail
    assert soon(lambda: not hosts.workers[1].processes(node))


def test_the_head_is_restarted(hosts: Hosts, injector: Injector) -> None:
    (before,) = hosts.head.processes(GCS)
    assert injector.inject(at(step=1).restart_head()).host == "head"
    assert soon(lambda: bool(hosts.head.processes(GCS)) and before not in hosts.head.processes(GCS))


def test_a_host_without_power_boots_after_its_seconds(hosts: Hosts, injector: Injector) -> None:
    done = injector.inject(at(step=1).power_off(rank=0, seconds=0.5))
    assert (done.host, done.detail) == ("h1", "h1 has no power") and hosts.workers[0].on


def test_a_host_or_the_store_is_cut_off_for_its_seconds(hosts: Hosts, injector: Injector) -> None:
    health = hosts.store.environment["AWS_ENDPOINT_URL"] + "/healthz"
    for fault, host in ((at(step=1).cut(rank=1, seconds=0.5), "h2"), (at(step=1).cut_store(seconds=0.5), "store")):
        done = injector.inject(fault)
        assert (done.host, done.detail) == (host, f"the cable of {host} is pulled")
        assert soon(lambda: hosts.workers[1].fetch(health) is not None)


def test_packets_among_ranks_are_dropped_and_only_that_counts_as_the_fault(
    hosts: Hosts, injector: Injector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_watch, "PATIENCE", 1.0)
    with pytest.raises(MachineError, match="packets that are dropped among its ranks"):
        injector.inject(at(step=1).part(rank=0))
    hosts.join()
    monkeypatch.setattr(run_watch, "PATIENCE", 30.0)
    talk = "import socket, time\nwhile True:\n socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('h2', 1)); time.sleep(0.1)"
    talking = hosts.workers[0].popen(sys.executable, "-c", talk)
    done = injector.inject(at(step=1).part(rank=0, seconds=0.5))
    talking.kill()
    assert "packets to and from h2 were dropped" in done.detail
    with pytest.raises(MachineError, match="parted"):
        hosts.dropped()


def test_a_full_disk_is_empty_again_after_its_seconds(hosts: Hosts, injector: Injector) -> None:
    def free() -> int:
        return int(hosts.workers[0].run("sh", "-c", "df -B1 --output=avail /tmp | tail -1").stdout)

    before = free()
    assert injector.inject(at(step=1).fill_disk(rank=0, seconds=0.5)).detail == "/tmp of h1 is full"
    assert free() == before


def test_a_drained_host_is_taken_away_when_its_notice_ends(hosts: Hosts, injector: Injector) -> None:
    done = injector.inject(at(step=1).drain(rank=1, seconds=0.5))
    assert done.detail == "Ray took the notice that h2 goes in 0.5 s" and not hosts.workers[1].on
    hosts.workers[1].power_on()
