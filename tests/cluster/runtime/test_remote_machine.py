"""Commands on a node of a Ray cluster."""

import os

import pytest

from cluster.runtime.machines import MachineError
from cluster.runtime.nodes import nodes
from cluster.runtime.remote_machine import RemoteMachine, cluster_machines


@pytest.mark.usefixtures("local_ray")
def test_a_command_runs_on_a_node_of_the_cluster_and_processes_there_are_seen_and_signalled() -> None:
    machine = RemoteMachine("there", nodes()[0].id)
    assert machine.run("echo", "hello").stdout == "hello\n"
    assert machine.state(os.getpid())[:1] in "RS"
    with pytest.raises(MachineError, match="on there `false` ended with 1"):
        machine.run("false")


@pytest.mark.usefixtures("local_ray")
def test_this_machine_is_the_first_of_a_cluster_and_comes_once() -> None:
    assert [type(machine).__name__ for machine in cluster_machines()] == ["Machine"]


@pytest.mark.usefixtures("local_ray")
def test_a_node_that_is_gone_is_an_error() -> None:
    with pytest.raises(MachineError, match="gone does not answer"):
        RemoteMachine("gone", "ab" * 28).run("true", seconds=20)
