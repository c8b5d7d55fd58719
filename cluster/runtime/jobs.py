"""Drivers as the cluster knows them: as jobs, whose places it takes back when it learns that their process is gone."""

import ray
from ray._private.state import state

from cluster.runtime.nodes import waited_for


def this_job() -> tuple[str, str] | None:
    """The session of the connected cluster, and the number that this process has in it; None of an actor, whose job another process is."""
    here = ray.get_runtime_context()
    return None if here.get_actor_id() else (here.get_session_name(), here.get_job_id())


def ended_at(session: str, job: str) -> int | None:
    """When the cluster learnt that a driver was gone, in milliseconds since 1970; None of another cluster's, or one that lives.

    Raises:
        RayError: if the cluster does not answer.
    """
    if ray.get_runtime_context().get_session_name() != session:
        return None
    return next((one["EndTime"] for one in waited_for(state.job_table) if one["JobID"] == job and one["IsDead"]), None)
