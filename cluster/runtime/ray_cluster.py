"""Where work is placed: on the Ray cluster there is, or on a small one of our own on this machine."""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import parameter, services, utils, worker
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.runtime.nodes import HEAD, draining_nodes, listens
from cluster.runtime.prices import MARKET
from cluster.storage import Permanent, StorageError, Store
from cluster.storage.base import probe_key

TIMED_OUT = "timed out during startup"
"""What Ray says, in an error without a class of its own, of a node that does not come up."""

OBJECT_STORE_BYTES = 200_000_000  # only small results pass through it; Ray's own default takes 30 % of the memory
PROBE_SECONDS = 2.0

VISIBLE_SECONDS = 60.0
"""Seconds that nodes have to look into a store; who has vanished a moment ago never answers."""

LINE = 200
"""Most characters of what a raylet says of an error; its log has the rest."""

RAYLET = "raylet"
"""Ray's name, in the place of a process's number, for who says it."""

CANNOT = "No available node types can fulfill"
"""How an autoscaler begins what it says every few seconds of what nothing that it may start has room for."""

_told: set[str] = set()
"""What autoscalers have said so in this process."""

_print, _events = worker.print_to_stdstream, worker.filter_autoscaler_events

PRINTER = "ray_print_logs"
"""Ray's name for what prints the output of the nodes' processes on the driver's terminal."""


@dataclass(frozen=True)
class Resources:
    """What the connected cluster has in all, busy or not: logical CPUs, GPUs, living nodes."""

    cpus: float
    gpus: float
    nodes: int


def connect(cpus: int = 0) -> Resources:
    """Join the cluster there is, else start a local Ray that ends with this process; a second call changes nothing.

    The cluster there is: the one RAY_ADDRESS names (`ray job submit` sets it; `local` means none), else the one that
    `ray start` left running on this machine. It is joined in the user's own environment, with the token found there.

    Args:
        cpus: the least number of logical CPUs of a local Ray, so that two ranks also start on one core.

    Raises:
        ConnectionError: if RAY_ADDRESS names a cluster that does not answer.
        RayNotStarted: if a local Ray does not start.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or _started_here()
        with _own_sigterm():
            if address in (None, "local"):
                _start_local(cpus)
            else:
                _join(address)
        _quiet()
    return resources()


def resources() -> Resources:
    """The resources of the connected cluster."""
    total = ray.cluster_resources()
    return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0), sum(node["Alive"] for node in ray.nodes()))


def driver_risk() -> str:
    """What may take this driver's machine away without need, as a sentence for people; empty where nothing better is known.

    A driver on the head ends with the head; a spot machine is taken back at any time. On a cluster of one machine that trains there is no
    better place.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = next(node for node in nodes if node["NodeID"] == ray.get_runtime_context().get_node_id())
    if len(nodes) == 1 and here["Resources"].get("CPU"):
        return ""
    again = "the run stops until the same command is given again; put drivers on a machine of their own (README, 'A cluster')"
    if HEAD in here["Resources"]:
        return f"this driver runs on the head of the cluster: when that machine restarts, {again}"
    if "spot" in [here["Labels"].get(label) for label in MARKET]:
        return f"this driver runs on a spot machine: when that is taken back, {again}"
    return ""


def assert_visible(store: Store, field: str, key: str = "") -> None:
    """Make sure that what the driver sees or writes in a store is seen on every living node that takes work: a head without CPUs need not.

    Args:
        store: a folder must be one that all nodes share; a bucket must be open to the credentials of each.
        field: the configuration field that names the store, for the message.
        key: an object that is there, for a store that is only read; without one something is written and deleted again.

    Raises:
        StorageError: naming the nodes that do not see it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return
    leaving = draining_nodes()
    nodes = [node for node in nodes if node["Resources"].get("CPU") and node["NodeID"] not in leaving]
    probe = key or probe_key(store)
    if not key:
        store.put(probe, b"")
    try:
        on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        asked = [_has.options(scheduling_strategy=where).remote(store, probe) for where in on]
        ray.wait(asked, num_returns=len(asked), timeout=VISIBLE_SECONDS)
        lacking = [node["NodeManagerAddress"] for node, answer in zip(nodes, asked, strict=True) if not _sees(answer)]
    finally:
        if not key:
            store.delete(probe)
    if lacking:
        raise Permanent(
            f"{field} is {store.url}, but {len(lacking)} of {len(nodes)} nodes do not see what is written there "
            f"({', '.join(lacking[:5])}): use a folder that all nodes mount, or {field}=s3://bucket/prefix with credentials on every node"
        )


def _sees(answer: ray.ObjectRef) -> bool:
    """What a node has answered; one that cannot is gone, or about to be, and no rank will be placed on it."""
    try:
        return ray.get(answer, timeout=0)
    except RayError:
        return True


@ray.remote(num_cpus=0, max_retries=0)
def _has(store: Store, key: str) -> bool:
    try:
        store.size(key)
    except StorageError:
        return False
    return True


def _started_here() -> str | None:
    """The address (`host:port`) that the last `ray start` noted on this machine, unless that cluster is dead."""
    address = services.find_bootstrap_address(None)
    return address if address and _listens(address) else None


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return port.isdigit() and listens(host, int(port), PROBE_SECONDS)


def _join(address: str) -> None:
    """Join, with the user's token file if there is one: a cluster without a token does not mind it."""
    if not _listens(address):  # Ray itself would wait for ever
        raise ConnectionError(
            f"RAY_ADDRESS is {address}, but no Ray cluster answers there (host:port, {PROBE_SECONDS:g} s): "
            "start one with `ray start --head`, or run on this machine alone with RAY_ADDRESS=local"
        )
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    ray.init(address)


class RayNotStarted(RuntimeError):
    """A Ray of this process's own did not start in time."""

    failure = "lost"
    advice = "the machine is busy, or short of memory: the same command when it is less so"


def _start_local(cpus: int) -> None:
    """Start a Ray that is nobody else's: on loopback only, with a token of its own, and on no port that a cluster needs.

    Without RAY_AUTH_TOKEN Ray would write `~/.ray/auth_token`, and from then on `ray start --head` would demand a token
    that `ray job submit` does not send. The variable stays set: Ray caches the token for the life of the process.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with _private_parameters():
        try:
            ray.init(
                address="local",
                num_cpus=max(cpus, int(utils.get_num_cpus())),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,  # or each start warns about the token
            )
        except Exception as error:
            if TIMED_OUT not in str(error):
                raise
            raise RayNotStarted("Ray, which has 30 s for it, did not start on this machine") from error
    logging.getLogger("ray").setLevel(logging.WARNING)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's own handler of SIGTERM, which Ray replaces by one that ends it with exit code 15."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _quiet() -> None:
    """Leave out of what Ray prints here what is its own talk; what is lost, and why, is said by us.

    A raylet that ends prints its whole state, and says it once more as an error, of which a line remains; without a dashboard Ray Train's
    watcher of its own controller cannot see, and says so; an autoscaler says at each of its looks what it cannot give.
    """
    for name, handle in list(global_worker_stdstream_dispatcher.handlers):
        if name == PRINTER:

            def unless_ray_s_own(data: dict[str, Any], handle: Callable[[dict[str, Any]], None] = handle) -> None:
                if data.get("pid") != RAYLET and data.get("actor_name") != "PlacementGroupCleaner":
                    handle(data)

            global_worker_stdstream_dispatcher.remove_handler(name)
            global_worker_stdstream_dispatcher.add_handler(name, unless_ray_s_own)
    worker.print_to_stdstream = _print_briefly
    worker.filter_autoscaler_events = _what_is_new


def _print_briefly(data: dict[str, Any], ignore_prefix: bool) -> None:
    """The first line of each error of a raylet, as far as a terminal is wide, and all else whole."""
    if data.get("pid") == RAYLET:
        data = {**data, "lines": [text.strip().partition("\n")[0][:LINE] for text in data["lines"]]}
    _print(data, ignore_prefix)


def _what_is_new(lines: list[str]) -> Iterator[str]:
    """What an autoscaler says, without what it has said of the same request before."""
    for message in _events(lines):
        if CANNOT not in message:
            yield message
        elif message not in _told:
            _told.add(message)
            yield message


@contextmanager
def _private_parameters() -> Iterator[None]:
    """Give the next Ray two parameters that `ray.init` has no argument for.

    Loopback, which `ray.init` replaces by the address of the machine; and any free port for the node's agent, whose
    fixed one a cluster on this machine needs for `ray job submit`.
    """
    original = parameter.RayParams.__init__

    def init(self: parameter.RayParams, **given: Any) -> None:
        original(self, **given | {"node_ip_address": "127.0.0.1", "dashboard_agent_listen_port": None})

    parameter.RayParams.__init__ = init  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        parameter.RayParams.__init__ = original  # type: ignore[method-assign]
