"""A cluster that is too small for a run, from the start or since a host was lost: the run waits, and goes on by itself."""

import sys
from pathlib import Path

import pytest

from cluster.runtime.faults import at
from tests.cluster.support.multihost import Run, cluster, one_host_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RAY_GIVES_UP = 60
"""Seconds after which Ray Train itself takes a worker group that finds no place for failed."""

LONGER = ("optim.epochs={autoencoder: 96, diffusion: 4}",)
"""640 steps of stage 1: on a quick machine 100 are over before `ray drain-node` has told the cluster anything."""


def test_a_host_is_lost_for_good_and_the_run_goes_on_when_a_spare_joins(tiny_shards: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, tiny_shards, workers=3) as hosts:
        run = Run(hosts, "lost", 3).start()
        done = run.suffer(at(step=60).power_off(rank=1))
        run.watch.spend(1.5 * RAY_GIVES_UP, lambda: run.process.poll() is not None)
        assert run.process.poll() is None, f"the driver waits:\n{run.said()[-3000:]}"
        hosts.add()
        assert run.end() == "DONE"
        assert not hosts.named(done.host).on
        assert run.attempts()[0] == (1, 0) and run.attempts()[-1] > (1, 0) and run.lives() == 1
        assert run.weights() == one_host_weights(tiny_shards, 3)


def test_a_run_waits_for_the_hosts_it_needs_and_starts_when_they_have_joined(tiny_shards: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, tiny_shards, workers=1) as hosts:
        run = Run(hosts, "early", 3).start()
        run.watch.spend(1.5 * RAY_GIVES_UP, lambda: run.process.poll() is not None)
        assert run.process.poll() is None, f"the driver waits:\n{run.said()[-3000:]}"
        assert run.watch.history == [], "nothing is trained yet"
        hosts.add()
        hosts.add()
        assert run.end() == "DONE"
        assert run.lives() == 1
        assert run.weights() == one_host_weights(tiny_shards, 3)


def test_a_machine_that_is_told_to_end_waits_until_its_rank_has_left_with_a_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    """As a pod does that is evicted: the hook is a command on the machine itself, which does not come back."""
    with cluster(tmp_path, tiny_shards, workers=3) as hosts:
        run = Run(hosts, "evicted", 2, *LONGER, "run.checkpoint_every=100000", "run.checkpoint_minutes=0").start()
        sight = run.watch.until(lambda sight: sight.step >= 20, "its step 20")
        name, _ = sight.ranks[1]
        (host,) = [host for host in hosts.workers if host.name == name]
        host.run(sys.executable, "infra/drain.py", "40")
        assert not host.processes("ray::RayTrainWorker")
        assert run.end() == "DONE"
        assert f"{name} (" in run.said() and "will be taken away" in run.said()
        assert run.attempts() == [(1, 0), (1, 1)] and run.weights() == one_host_weights(tiny_shards, 2, *LONGER)
