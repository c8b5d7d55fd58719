"""The machines of the Ray cluster as they are now: what each has, what of it is free, and which are about to go."""

import datetime
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

import ray
from ray._private.state import available_resources_per_node, state

NODE_ID = "ray.io/node-id"
"""Label that Ray gives every node; who asks for its value is placed there."""

HEAD = "node:__internal_head__"
"""The resource by which Ray marks its head."""

LOOPBACK = "127.0.0.1"

SAID_AFTER = 10.0
"""Seconds after which it is said that a cluster does not answer."""

SAID_AGAIN = 60.0
"""Seconds after which it is said again."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A machine that is alive.

    Attributes:
        id: Ray's, in hex.
        address: IP address.
        name: of the host.
        labels: given at `ray start --labels`, and Ray's own.
        total: resources by name.
        free: those that nobody has reserved; a second or so old.
        draining: whether it will be taken away, and takes no new work.
        port: of its raylet.
    """

    id: str
    address: str
    name: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]
    draining: bool = False
    port: int = 0


def nodes() -> list[Node]:
    """The living machines of the connected cluster, in the order of their ids.

    Raises:
        RayError: if the cluster does not answer.
    """
    free, leaving, all_known = waited_for(lambda: (available_resources_per_node(), draining_nodes(), ray.nodes()))
    return [
        Node(
            one["NodeID"],
            one["NodeManagerAddress"],
            one["NodeManagerHostname"],
            one["Labels"],
            one["Resources"],
            free.get(one["NodeID"], {}),
            one["NodeID"] in leaving,
            one["NodeManagerPort"],
        )
        for one in sorted(all_known, key=lambda one: one["NodeID"])
        if one["Alive"]
    ]


def listens(host: str, port: int, seconds: float = 3) -> bool:
    """Whether somebody takes connections there: of a raylet that is gone Ray itself may know only many seconds later."""
    try:
        socket.create_connection((host, port), seconds).close()
    except OSError:
        return False
    return True


def waited_for(question: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> T:
    """The answer to a question, however long it takes, which is said; Ctrl-C ends it.

    A cluster without its head is silent, deep in Ray's own code.
    """
    answers, errors = list[T](), list[BaseException]()

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=ask, daemon=True)
    since, began, due = datetime.datetime.now().strftime("%H:%M:%S"), clock(), SAID_AFTER
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if (waited := clock() - began) >= due and thread.is_alive():
            log.warning("the head of the cluster has not answered since %s: it is waited for, %.0f s so far", since, waited)
            due = waited + SAID_AGAIN
    if due > SAID_AFTER:
        log.warning("the head of the cluster answers again, after %.0f s", clock() - began)
    for error in errors:
        raise error
    return answers[0]


def draining_nodes() -> dict[str, int]:
    """Ids of the machines that will be taken away, and when: milliseconds since 1970, 0 where nobody said."""
    return dict(state.get_draining_nodes())


def is_private() -> bool:
    """Whether the connected Ray is on loopback: no other machine can ever join."""
    return all(one["NodeManagerAddress"] == LOOPBACK for one in ray.nodes())
