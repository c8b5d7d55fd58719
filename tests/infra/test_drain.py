"""Who hears that a machine goes tells Ray, and waits for the ranks; on a real cluster: tests/cluster/multihost/test_hosts_lost.py."""

import subprocess
import sys

import pytest

from infra import drain
from tests.tiny import ROOT


def test_a_machine_without_ray_is_told_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.drain.Path.glob", lambda *_: iter(()))
    with pytest.raises(LookupError, match="ray start"):
        drain.raylet()


@pytest.mark.parametrize(("looks", "gone"), [(0, True), (3, True), (100, False)])
def test_ranks_are_waited_for_until_the_deadline(looks: int, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, now = [], [0.0]

    def commands() -> list[list[str]]:
        seen.append(1)
        return [["sh"], ["ray::RayTrainWorker__execute" if len(seen) <= looks else "ray::IDLE"]]

    monkeypatch.setattr(drain, "_commands", commands)
    assert drain.wait_for_ranks(10, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds)) == gone
    assert now[0] == (looks * drain.LOOK if gone else 10)


@pytest.mark.starts
@pytest.mark.parametrize("given", [[], ["soon"]])
def test_without_seconds_it_says_how_it_is_used(given: list[str]) -> None:
    done = subprocess.run([sys.executable, ROOT / "infra/drain.py", *given], capture_output=True, text=True)
    assert done.returncode == 2 and "python infra/drain.py SECONDS" in done.stdout
