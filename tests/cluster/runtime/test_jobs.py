"""A driver that is gone has ended when its cluster learnt of it; a real one is killed in tests/cluster/driver/test_books_close.py."""

import pytest
import ray

from cluster.runtime import jobs
from cluster.runtime.jobs import ended_at, this_job


@pytest.mark.usefixtures("local_ray")
def test_a_driver_that_lives_or_is_of_another_cluster_or_unknown_has_not_ended() -> None:
    session, here = this_job() or ("", "")
    assert {one["JobID"] for one in jobs.state.job_table()} >= {here}
    assert ended_at(session, here) is None and ended_at(session, "99000000") is None and ended_at("another", here) is None


@ray.remote(num_cpus=0)
class Trial:
    """An actor, as the driver of a sweep's trial is."""

    def job(self) -> tuple[str, str] | None:
        return this_job()


@pytest.mark.usefixtures("local_ray")
def test_an_actor_is_no_job_for_its_end_is_not_the_end_of_the_job_that_started_it() -> None:
    assert ray.get(Trial.remote().job.remote()) is None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("local_ray")
def test_of_one_that_is_gone_the_cluster_knows_when(monkeypatch: pytest.MonkeyPatch) -> None:
    session, here = this_job() or ("", "")
    monkeypatch.setattr(jobs.state, "job_table", lambda: [{"JobID": "7", "IsDead": True, "EndTime": 1234}])
    assert ended_at(session, "7") == 1234 and ended_at(session, here) is None
