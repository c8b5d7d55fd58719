"""Runs over several hosts, with everything in S3: in the weights of one host, whatever happens to a host meanwhile."""

import re
from pathlib import Path

import pytest

from cluster.runtime.faults import Fault, at, recovery
from cluster.runtime.hosts import RAYLET, Hosts
from tests.cluster.support.multihost import Run, one_host_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HALFWAY = at(step=60)


@pytest.fixture
def whole(hosts: Hosts) -> Hosts:
    """The hosts of this module, once all of them are there."""
    hosts.wait(nodes=4)
    return hosts


@pytest.mark.parametrize(("ranks", "submit"), [(2, True), (3, False)], ids=["2-submitted", "3-direct"])
def test_over_several_hosts_the_weights_are_those_of_one(whole: Hosts, tiny_shards: Path, ranks: int, submit: bool) -> None:
    run = Run(whole, f"plain-{ranks}-{submit}", ranks).start(submit)
    sight = run.watch.until(lambda sight: len(sight.ranks) == ranks, "all its ranks")
    assert run.end() == "DONE"
    assert len({host for host, _ in sight.ranks.values()}) == ranks, "every rank has a host of its own"
    assert "head" not in {host for host, _ in sight.ranks.values()}
    assert run.attempts() == [(1, 0)]
    assert run.weights() == one_host_weights(tiny_shards, ranks)


def disturbed(hosts: Hosts, shards: Path, fault: Fault, record_property) -> Run:
    """A run of three ranks that a fault happened to ends DONE in the weights of the undisturbed one, after a second start."""
    run = Run(hosts, f"{fault.kind}-{fault.rank}", 3).start()
    done = run.suffer(fault)
    assert run.end() == "DONE"
    report(record_property, run, done)
    assert run.attempts() == [(1, 0), (1, 1)], "the worker group was started a second time"
    assert run.weights() == one_host_weights(shards, 3)
    return run


def report(record_property, run: Run, done) -> None:
    """Not a promise: what was measured on this machine, shown by `pytest -rP` and kept in a junit file."""
    measured = recovery(run.watch, done)
    print(f"{done.fault.kind} on {done.host} after step {done.before.step} ({done.detail}): {measured}")
    for name, value in measured._asdict().items():
        record_property(f"{done.fault.kind} {name}", round(value, 1))


def test_a_killed_rank_is_brought_back(whole: Hosts, tiny_shards: Path, record_property) -> None:
    disturbed(whole, tiny_shards, HALFWAY.kill(rank=1), record_property)


def test_a_host_whose_raylet_is_killed_comes_back_and_the_run_goes_on(whole: Hosts, tiny_shards: Path, record_property) -> None:
    before = {host.node_id for host in whole.workers}
    disturbed(whole, tiny_shards, HALFWAY.kill_raylet(rank=1), record_property)
    assert len(before & {host.node_id for host in whole.workers}) == 2, "one raylet is another one"


def test_a_host_that_is_cut_off_for_20_s_comes_back_and_the_run_goes_on(whole: Hosts, tiny_shards: Path, record_property) -> None:
    disturbed(whole, tiny_shards, HALFWAY.cut(rank=2, seconds=20), record_property)
    assert all(host.processes(RAYLET) for host in whole.workers)


def test_a_store_that_is_away_for_30_s_is_said_and_loses_nothing(whole: Hosts, tiny_shards: Path, record_property) -> None:
    run = Run(whole, "away", 3, "run.checkpoint_every=24").start()
    report(record_property, run, run.suffer(HALFWAY.cut_store(seconds=30)))
    assert run.end() == "DONE"
    assert re.search(r"no step for \d+ s: rank \d on h\d \(\S+\) in phase (data_wait|checkpoint) of its step \d+", run.said()), run.said()
    assert run.attempts() == [(1, 0)] and run.weights() == one_host_weights(tiny_shards, 3)


def test_packets_that_are_dropped_between_ranks_hang_no_run_five_times(whole: Hosts, tiny_shards: Path, record_property) -> None:
    """No connection breaks, so no rank fails: all of them wait, and say so to a driver who hears them."""
    run = Run(whole, "dropped", 3).start()
    for number, step in enumerate((20, 45, 70, 95, 120)):
        report(record_property, run, run.suffer(at(step=step).part(rank=number % 3, seconds=30)))
    assert run.end() == "DONE"
    said = [line for line in run.said().splitlines() if "writing the stacks of all ranks" in line]
    assert len(said) >= 5, run.said()[-6000:]
    for line in said:
        assert re.search(r"rank \d on h\d \(\S+\) in phase \w+ of its step \d+ for \d+ s", line), line
    assert run.weights() == one_host_weights(tiny_shards, 3)
