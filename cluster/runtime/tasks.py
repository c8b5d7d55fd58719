"""Many independent pieces of work over the connected cluster."""

import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Protocol

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Workers
from cluster.runtime.device import worker_environment
from cluster.runtime.failures import LOST, Budget, failure_of
from cluster.runtime.nodes import nodes
from cluster.runtime.postmortem import kill_worker
from cluster.runtime.stuck import ended_if_stuck

log = logging.getLogger(__name__)

RETRIES = 3
"""Times that calls are tried again without any call coming to its end, for each class of failure."""


CALL_TRIES = 4
"""Times that a single call may fail, whatever others come to: one that always does is at fault itself."""


RAY_RETRIES = 3
"""Times that Ray itself runs a call again whose process is gone, on another machine where there is one."""


ASKED_EVERY = 1.0
"""Seconds between two questions to the head what room there is."""


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
        """There is room for a call from now on, as far as is known: other jobs' tasks may be before it in Ray's queue."""

    def end(self, call: int, address: str = "", starting: float = 0.0, working: float = 0.0) -> None:
        """It was answered by a machine, in seconds of its process's start and of its own; or it is given up."""

    def lose(self, call: int, kind: str, text: str, address: str = "") -> None:
        """It failed, for a class of failure, on this machine if that is known."""


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
    under_way = _Calls(function, calls, workers, shared, account)
    try:
        while under_way.left:
            under_way.start()
            if (answer := under_way.answer()) is not None:
                yield answer
    finally:
        under_way.give_up()


class _Calls:
    """Those of one `map_tasks`."""

    def __init__(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: Workers, shared: Any, account: Account | None
    ):
        self._name, self._calls, self._workers, self._account = function.__name__, calls, workers, account
        self._task = ray.remote(_call).options(
            name=self._name,
            max_retries=RAY_RETRIES,
            num_cpus=workers.cpus,
            num_gpus=1 if workers.gpu else 0,
            scheduling_strategy="DEFAULT",  # anywhere: the driver of a sweep's trial sits in a placement group without room for tasks
            runtime_env={"env_vars": worker_environment(workers)},
        )
        self._function = cloudpickle.dumps(function)  # whose import may be what gets stuck: it is watched, too
        self._box = [ray.put(shared)]  # in a list: else Ray takes it out itself, for every call
        self._waiting = list(range(len(calls)))[::-1]
        self._running: dict[Any, int] = {}
        self._begun = set[int]()
        self._processes: set[TaskProcess] = set()
        self._budget = Budget(RETRIES)
        self._failures = Counter[int]()
        self._asked, self._places, self._ours = -math.inf, 1, 0

    @property
    def left(self) -> bool:
        """Whether there is an answer to come."""
        return bool(self._waiting or self._running)

    def start(self) -> None:
        """Give Ray as many calls as there are places, and as many again: they wait in its queue, where an autoscaler sees them."""
        if time.monotonic() - self._asked >= ASKED_EVERY:  # a cluster may have grown; to ask for each answer would load the head
            there, self._asked = [one for one in nodes() if not one.draining], time.monotonic()
            self._places = max(1, sum(_places(one.total, self._workers) for one in there))
            self._ours = min(self._places, len(self._begun) + sum(_places(one.free, self._workers) for one in there))
        while self._waiting and len(self._running) < 2 * self._places:
            number = self._waiting.pop()
            self._running[self._task.remote(self._function, self._box, self._calls[number], STUCK)] = number
        for number in islice(self._running.values(), self._ours):
            self._begin(number)

    def answer(self) -> tuple[int, Any] | None:
        """The next call that is answered, and its result; None if one failed that is made again, or none came for a while."""
        done, _ = ray.wait(list(self._running), num_returns=1, timeout=SAID_EVERY)
        if not done:
            log.warning("%s: no result for %g s; %s", self._name, SAID_EVERY, _room(self._workers))
            return None
        number = self._running.pop(done[0])
        try:
            process, seconds, result = ray.get(done[0])
        except RayError as error:
            self._processes |= {(address, int(pid)) for pid, address in RAISED_IN.findall(str(error))}
            self._failed(number, error)
            return None
        self._processes.add(process)
        self._budget.refill()
        self._ours += number not in self._begun  # a place that was another's: the next call in Ray's queue has it now
        self._begin(number)
        if self._account:
            self._begun.discard(number)
            self._account.end(number, process[0], *seconds)
        return number, result

    def give_up(self) -> None:
        """Leave nothing behind: neither calls, nor what is booked of them, nor processes that hold a GPU's memory."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        for number in self._begun:
            assert self._account
            self._account.end(number)
        if self._workers.gpu:
            with suppress(RayError):  # a cluster that does not answer; what came before says more
                _end(self._processes)

    def _begin(self, number: int) -> None:
        if self._account and number not in self._begun:
            self._begun.add(number)
            self._account.begin(number)

    def _failed(self, number: int, error: RayError) -> None:
        call = f"{self._name}({', '.join(map(repr, self._calls[number])):.100})"
        cause = error.cause if isinstance(error, RayTaskError) else TaskLost(f"{call}: {_first_line(error)}", error)
        cause.__cause__ = error
        failure = failure_of(cause)
        self._failures[number] += 1
        if self._account and number in self._begun:
            self._begun.remove(number)
            address = next((address for _, address in RAISED_IN.findall(str(error))), "")
            self._account.lose(number, failure.name if failure else "user", str(cause), address)
        if failure is None or not self._budget.allows(failure) or self._failures[number] == CALL_TRIES:
            raise cause
        place = raised_in(cause)
        log.warning("%s of %s, which is tried again (%s)%s: %s", failure.name, call, self._budget, place and f", {place}", cause)
        self._waiting.append(number)


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


def _needs(workers: Workers) -> tuple[str, float]:
    """What there must be of which resource for a call."""
    return ("GPU", 1.0) if workers.gpu else ("CPU", workers.cpus)


def _places(amounts: Mapping[str, float], workers: Workers) -> int:
    """For how many calls a machine's resources suffice."""
    name, each = _needs(workers)
    return int(amounts.get(name, 0.0) / each)


def _room(workers: Workers) -> str:
    name, each = _needs(workers)
    there = nodes()
    free, total = sum(one.free.get(name, 0.0) for one in there), sum(one.total.get(name, 0.0) for one in there)
    return f"a call needs {each:g} {name}, and {free:g} of {total:g} are free"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_taken: dict[str, Any] = {}
"""What this process took out of the object store last."""


_loaded: list[float] = [time.monotonic()]
"""When this process began to load what its first call needs; empty after that call."""


_first: dict[str, list[Any]] = {}
"""The GPUs that the first call of this process was given."""


def _call(pickled: bytes, box: list[ray.ObjectRef], call: tuple[Any, ...], stuck: float) -> tuple[TaskProcess, tuple[float, float], Any]:
    if (given := ray.get_gpu_ids()) != _first.setdefault("gpus", given):
        os._exit(1)  # CUDA stays where it began, beside whoever is there: Ray makes the call again, in another process
    with ended_if_stuck(stuck):
        function = cloudpickle.loads(pickled)
        began = time.monotonic()
        starting = began - _loaded.pop() if _loaded else 0.0
        (reference,) = box
        if (name := reference.hex()) not in _taken:
            _taken.clear()
            _taken[name] = ray.get(reference)
        result = function(_taken[name], *call)
    return (ray.util.get_node_ip_address(), os.getpid()), (starting, time.monotonic() - began), result
