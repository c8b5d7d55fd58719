"""Many independent pieces of work over the connected cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.config.schema import Workers
from cluster.runtime.ray_cluster import resources


def map_tasks(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: Workers, shared: Any = None
) -> Iterator[tuple[int, Any]]:
    """Run `function(shared, *call)` for every call as a Ray task; a task whose machine is lost runs again elsewhere.

    Args:
        function: importable on every node; its result and arguments pickle.
        calls: arguments of each call.
        workers: a task gets what a rank gets: CPUs, threads, a GPU where ranks have one.
        shared: put into the object store once, and taken out once by each process, not once per call; the same object for
            all calls that a process answers, so what it keeps of itself (`cached_property`) is kept.

    Yields:
        (number of the call, its result), in the order they finish.

    Raises:
        Whatever a call raised.
    """
    task = ray.remote(_call).options(
        name=function.__name__,
        num_cpus=workers.cpus,
        num_gpus=1 if workers.gpu else 0,
        scheduling_strategy="DEFAULT",  # anywhere: the driver of a sweep's trial sits in a placement group without room for tasks
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(workers.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}},
    )
    box = [ray.put(shared)]  # in a list: else Ray takes it out itself, for every call
    there = resources()
    at_once = 2 * max(1, int(there.gpus if workers.gpu else there.cpus / workers.cpus))
    waiting = list(enumerate(calls))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, call = waiting.pop()
                running[task.remote(function, box, call)] = number
            done, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done[0]), ray.get(done[0])
    except RayTaskError as error:
        raise error.cause from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


_taken: dict[str, Any] = {}
"""What this process took out of the object store last."""


def _call(function: Callable[..., Any], box: list[ray.ObjectRef], call: tuple[Any, ...]) -> Any:
    (reference,) = box
    if (name := reference.hex()) not in _taken:
        _taken.clear()
        _taken[name] = ray.get(reference)
    return function(_taken[name], *call)
