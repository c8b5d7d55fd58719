"""The other machines of a Ray cluster, as places where commands run: without ssh, and with no more rights than Ray has there."""

import os
import platform
import subprocess
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.machines import Machine, MachineError
from cluster.runtime.nodes import nodes


class RemoteMachine(Machine):
    """A node of the connected cluster; a command on it is a Ray task, in the environment of its workers."""

    def __init__(self, name: str, node: str):
        super().__init__(name)
        self._place = NodeAffinitySchedulingStrategy(node, soft=False)

    def run(self, *command: str | Path, check: bool = True, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command and return what it said.

        Raises:
            MachineError: if its exit code is not 0, unless `check` is off, or if the node does not answer.
        """
        words = list(map(str, command))
        try:
            done = ray.get(_command.options(scheduling_strategy=self._place).remote(words, seconds), timeout=seconds)
        except RayError as error:
            raise MachineError(f"{self.name} does not answer: {error}") from None
        if check and done.returncode:
            raise MachineError(f"on {self.name} `{' '.join(words)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done


def cluster_machines() -> list[Machine]:
    """This machine, then the other nodes of the connected cluster."""
    here = platform.node()
    return [Machine(), *(RemoteMachine(node.name, node.id) for node in nodes() if node.name != here)]


@ray.remote(num_cpus=0, max_retries=0)
def _command(words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ, stdin=subprocess.DEVNULL)
