"""What the cluster's autoscaler may start, in its own words: Ray tells nobody, so its configuration is read where its process runs.

`ray.cluster_resources` knows only what is there, and Ray's table of a cluster's largest size is filled by no open-source autoscaler
(Ray 2.60). One whose process is not seen on the head, as KubeRay's, which has a container of its own, tells nothing.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import ray
import yaml
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of Cython, without types
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.nodes import HEAD, Node, nodes, waited_for

ANSWER_SECONDS = 30.0
"""Seconds that the head has to read the configuration; one that is too busy is asked again later."""

OPTION = "--autoscaling-config="
"""Of an autoscaler's process, before the path of its configuration."""


@dataclass(frozen=True)
class MachineType:
    """Machines that an autoscaler may start.

    Attributes:
        name: in its configuration.
        resources: of one, by Ray's names, as far as they are told.
        most: so many at once.
        labels: of one. For who asks for others it starts nothing, whatever `ray start` may add on the machine.
    """

    name: str
    resources: dict[str, float]
    most: int
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Autoscaler:
    """What is known of one.

    Attributes:
        types: that it may start; empty where its configuration cannot be read.
        most: machines of all types at once.
    """

    types: tuple[MachineType, ...] = ()
    most: int = 0

    def machines(self) -> list[Node]:
        """Those that it may start, by type."""
        each = [(one, number) for one in self.types for number in range(one.most)]
        return [Node(f"{one.name} {number}", "", one.name, one.labels, one.resources, one.resources) for one, number in each]

    @property
    def counts(self) -> frozenset[str]:
        """Resources that each of its types tells: it starts nothing for who asks for another."""
        told = [frozenset(one.resources) for one in self.types]
        return frozenset.intersection(*told) if told else frozenset()


def machines_by_hand(scaler: Autoscaler) -> list[Node]:
    """The machines that are there and that the autoscaler did not start, its head among them, as if nobody used them.

    Raises:
        RayError: if the cluster does not answer.
    """
    gcs, types = ray.get_runtime_context().gcs_address, {one.name for one in scaler.types}
    known = waited_for(GcsClient(gcs).get_all_node_info)
    started = {number.hex() for number, one in known.items() if one.node_type_name in types}
    return [replace(node, free=node.total, draining=False) for node in nodes() if node.id not in started]


_read: dict[str, Autoscaler] = {}
"""Session of a cluster -> its autoscaler, once its head has answered."""


def autoscaler() -> Autoscaler | None:
    """That of the connected cluster; None of a cluster whose machines are started by hand, or of which none is known yet.

    Raises:
        RayError: if the cluster does not answer.
    """
    session = ray.get_runtime_context().get_session_name()
    if session not in _read:
        if not waited_for(_is_there):
            return None
        if (found := _configuration()) is None:
            return Autoscaler()
        _read[session] = found
    return _read[session]


def _is_there() -> bool:
    """Whether one has reported: the second generation by its state, the first by a key."""
    reply = GetClusterStatusReply.FromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status())
    return reply.autoscaling_state.autoscaler_state_version > 0 or _internal_kv_get(DEBUG_AUTOSCALING_STATUS) is not None


def _configuration() -> Autoscaler | None:
    """As the head reads it; None if it does not answer."""
    head = next((node for node in nodes() if HEAD in node.total), None)
    if head is None:
        return None
    there = NodeAffinitySchedulingStrategy(head.id, soft=False)
    answer = read_configuration.options(scheduling_strategy=there).remote(ray.get_runtime_context().gcs_address)
    done, _ = ray.wait([answer], timeout=ANSWER_SECONDS)
    if not done:
        ray.cancel(answer, force=True)
        return None
    try:
        return ray.get(answer)
    except RayError:
        return None


@ray.remote(num_cpus=0, max_retries=0)
def read_configuration(gcs: str) -> Autoscaler:
    """On the head: what the process that scales this cluster was told; nothing is known of one that is not to be seen there."""
    port = gcs.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        ours = any(word.startswith("--gcs-address=") and word.rpartition(":")[2] == port for word in words)
        paths = [word.removeprefix(OPTION) for word in words if word.startswith(OPTION)]
        if ours and paths:
            return parsed(yaml.safe_load(Path(paths[0]).expanduser().read_text()))
    return Autoscaler()


def parsed(config: dict) -> Autoscaler:
    """Types and limits of a configuration with its defaults, as `ray up` leaves it on the head, of which no more comes.

    Returns:
        Without types if there is one whose resources are not told.
    """
    types = {name: one for name, one in (config.get("available_node_types") or {}).items() if name != config.get("head_node_type")}
    if not all(one.get("resources") for one in types.values()):
        return Autoscaler()
    most = int(config.get("max_workers", 0))
    return Autoscaler(tuple(_type(name, one, most) for name, one in types.items()), most)


def _type(name: str, one: dict, most: int) -> MachineType:
    resources = {key: float(amount) for key, amount in one["resources"].items()}
    return MachineType(name, resources, min(most, int(one.get("max_workers", most))), one.get("labels") or {})
