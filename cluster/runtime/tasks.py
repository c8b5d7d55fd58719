"""Many independent pieces of work over the connected cluster."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Workers
from cluster.runtime.device import worker_environment
from cluster.runtime.failures import LOST, Budget, failure_of
from cluster.runtime.nodes import nodes
from cluster.runtime.postmortem import kill_worker
from cluster.runtime.ray_cluster import resources
from cluster.runtime.stuck import ended_if_stuck

log = logging.getLogger(__name__)

RETRIES = 3
"""Times that calls are tried again without any call coming to its end, for each class of failure."""


RAY_RETRIES = 3
"""Times that Ray itself runs a call again whose process is gone, on another machine where there is one."""


SAID_EVERY = 60.0
"""Seconds without a result after which it is said what room there is, and said again."""


STUCK = 3600.0
"""Seconds after which a call that neither ends nor says that it is `alive` is taken for one that never will: its process ends, with the
stacks of its threads in Ray's log of it, and the call is made again as one whose process is gone."""


GIVING_BACK = 20.0
"""Seconds that processes have to end and give back the memory of their GPUs."""

RAISED_IN = re.compile(r"\(pid=(\d+), ip=([^)]+)\)")
"""Where Ray says in which process an error was raised; its own attributes are hidden behind those of the error."""

TaskProcess = tuple[str, int]
"""Address of a machine, and number of a process on it."""


class Account(Protocol):
    """Who is told where the time of calls goes."""

    def begin(self, call: int) -> None:
        """There is room for a call from now on."""

    def end(self, call: int, address: str = "", starting: float = 0.0, working: float = 0.0) -> None:
        """It was answered by a machine, in seconds of its process's start and of its own; or it is given up."""

    def lose(self, call: int, kind: str, text: str) -> None:
        """It failed, for a class of failure, and is tried again."""


class TaskLost(RuntimeError):
    """The processes that answered a call, or their machines, went away each time; `failure` says why, as far as Ray knows."""

    def __init__(self, what: str, error: RayError):
        super().__init__(what)
        self.failure = (failure_of(error) or LOST).name


def raised_in(error: BaseException) -> str:
    """Host and process of the call that raised what `map_tasks` raises, as far as Ray says."""
    found = RAISED_IN.findall(str(error.__cause__ or ""))
    return f"host {found[0][1]}, process {found[0][0]}" if found else ""


def map_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    workers: Workers,
    shared: Any = None,
    account: Account | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run `function(shared, *call)` for every call as a Ray task; one that fails is tried again where the failure table says so.

    Args:
        function: importable on every node; its result and arguments pickle.
        calls: arguments of each call.
        workers: a task gets what a rank gets: CPUs, threads, a GPU where ranks have one.
        shared: put into the object store once, and taken out once by each process, not once per call; the same object for
            all calls that a process answers, so what it keeps of itself (`cached_property`) is kept.
        account: told where the time of the calls goes.

    A call that may take longer than STUCK says with `alive` that it gets on; one that is neither done nor heard of is made again.

    Processes that had a GPU are ended when all calls are done: Ray would keep them, and with each a context and a cache on its GPU, which
    the ranks that come next need.

    Yields:
        (number of the call, its result), in the order they finish.

    Raises:
        Whatever a call raised.
        TaskLost: if there is nobody to raise it.
    """
    task = ray.remote(_call).options(
        name=function.__name__,
        max_retries=RAY_RETRIES,
        num_cpus=workers.cpus,
        num_gpus=1 if workers.gpu else 0,
        scheduling_strategy="DEFAULT",  # anywhere: the driver of a sweep's trial sits in a placement group without room for tasks
        runtime_env={"env_vars": worker_environment(workers)},
    )
    box = [ray.put(shared)]  # in a list: else Ray takes it out itself, for every call
    there = resources()
    places = max(1, int(there.gpus if workers.gpu else there.cpus / workers.cpus))
    at_once, begun = 2 * places, set[int]()
    waiting = list(enumerate(calls))[::-1]
    running: dict[Any, int] = {}
    processes: set[TaskProcess] = set()
    budget = Budget(RETRIES)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, call = waiting.pop()
                running[task.remote(function, box, call, STUCK)] = number
            for number in islice(running.values(), places):  # the others wait in Ray's queue
                if account and number not in begun:
                    begun.add(number)
                    account.begin(number)
            done, _ = ray.wait(list(running), num_returns=1, timeout=SAID_EVERY)
            if not done:
                log.warning("%s: no result for %g s; %s", function.__name__, SAID_EVERY, _room(workers))
                continue
            number = running.pop(done[0])
            try:
                process, seconds, result = ray.get(done[0])
                processes.add(process)
            except RayError as error:
                processes |= {(address, int(pid)) for pid, address in RAISED_IN.findall(str(error))}
                cause = error.cause if isinstance(error, RayTaskError) else TaskLost(f"{function.__name__}: {_first_line(error)}", error)
                cause.__cause__ = error
                failure = failure_of(cause)
                if failure is None or not budget.allows(failure):
                    raise cause from error
                place = raised_in(cause)
                log.warning("%s of call %d, which is tried again (%s)%s: %s", failure.name, number, budget, place and f", {place}", cause)
                waiting.append((number, calls[number]))
                if account and number in begun:
                    begun.remove(number)
                    account.lose(number, failure.name, str(cause))
            else:
                budget.refill()
                if account:
                    if number not in begun:
                        account.begin(number)
                    begun.discard(number)
                    account.end(number, process[0], *seconds)
                yield number, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        for number in begun:
            assert account
            account.end(number)
        if workers.gpu:
            with suppress(RayError):  # a cluster that does not answer; what came before says more
                _end(processes)


def _end(processes: set[TaskProcess]) -> None:
    ending = []
    for node in nodes():
        if pids := [pid for address, pid in processes if address == node.address]:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            ending.append(_kill.options(scheduling_strategy=there).remote(pids))
    if ending:  # a machine that does not answer has nothing to give back
        ray.wait(ending, num_returns=len(ending), timeout=GIVING_BACK)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pids: list[int]) -> None:
    for pid in pids:
        kill_worker(pid)


def _room(workers: Workers) -> str:
    name, each = ("GPU", 1.0) if workers.gpu else ("CPU", workers.cpus)
    there = nodes()
    free, total = sum(one.free.get(name, 0.0) for one in there), sum(one.total.get(name, 0.0) for one in there)
    return f"a call needs {each:g} {name}, and {free:g} of {total:g} are free"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_taken: dict[str, Any] = {}
"""What this process took out of the object store last."""


_loaded: list[float] = [time.monotonic()]
"""When this process began to load what its first call needs; empty after that call."""


def _call(
    function: Callable[..., Any], box: list[ray.ObjectRef], call: tuple[Any, ...], stuck: float
) -> tuple[TaskProcess, tuple[float, float], Any]:
    began = time.monotonic()
    starting = began - _loaded.pop() if _loaded else 0.0
    (reference,) = box
    if (name := reference.hex()) not in _taken:
        _taken.clear()
        _taken[name] = ray.get(reference)
    with ended_if_stuck(stuck):
        result = function(_taken[name], *call)
    return (ray.util.get_node_ip_address(), os.getpid()), (starting, time.monotonic() - began), result
