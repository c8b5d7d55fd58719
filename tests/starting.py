"""Which tests start a process, Ray or a server (mark `starts`), and a guard that holds all others to their word.

`make check` runs the others. A test is marked by what it asks for: every fixture of STARTING starts something. What a test starts
with its own hands is marked by hand.
"""

import multiprocessing.process
import multiprocessing.util
import re
import sys
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]

STARTING = {"object_store", "local_ray", "shards", "finished", "every_split"}
"""The fixtures that start something, also where a test asks for them through others."""

HOSTS = (
    "tests/cluster/multihost/",
    "tests/cluster/driver/test_books_close.py",
    "tests/cluster/driver/test_machines_come_and_go.py",
    "tests/cluster/driver/test_told_to_end.py",
    "tests/cluster/chaos/test_prove.py",
)
"""Where the tests are that start a Ray of several nodes."""

EVENTS = {
    "subprocess.Popen": "process",
    "os.fork": "process",
    "os.forkpty": "process",
    "os.posix_spawn": "process",
    "os.system": "process",
    "socket.bind": "server",
}
"""Audit events of Python -> what is started."""

_watched: list[pytest.Item] = []
"""The test that runs and is not marked."""


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests whose fixtures start something."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if STARTING & set(getattr(item, "fixturenames", ())) or parameters.get("store") == "s3":
            item.add_marker("starts")


class Scheduling(LoadScopeScheduling):
    """Which tests two processes keep together, as `scope` says.

    pytest-xdist's own groups write to an attribute of items that pytest 9.2 does not have any more, and do nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid, slow=self.config.option.markexpr.startswith("slow"))


def scope(nodeid: str, slow: bool) -> str:
    """What a test is kept together with: its file, and all files that ask for the run that `finished` trains.

    That takes longer than anything else and is shared by many; a Ray and a server each process has its own of. The slow tests start
    what they need themselves, and those of several hosts come one after the other: two clusters at once make each other ten times slower.
    """
    file = nodeid.partition("::")[0]
    if slow:
        return "hosts" if file.startswith(HOSTS) else file
    return "finished" if file in _asking() else file


@cache
def _asking() -> set[str]:
    """The files whose tests ask for a trained run."""
    asks = re.compile(r"^def \w+\(.*\b(finished|trained): ", re.MULTILINE)
    tests = (path for path in ROOT.glob("tests/**/test_*.py") if asks.search(path.read_text()))
    return {path.relative_to(ROOT).as_posix() for path in tests}


def watch(item: pytest.Item) -> Generator[None, object, object]:
    """Fail whatever starts something in this test, its own fixtures included, unless it is marked, or slow and so not in `make check`."""
    if not (item.get_closest_marker("starts") or item.get_closest_marker("slow")):
        _watched.append(item)
    try:
        return (yield)
    finally:
        _watched.clear()


def _forbid(what: str) -> None:
    if _watched:
        pytest.fail(
            f"this test starts a {what}, so it belongs to `make test` and not to `make check`: mark it with @pytest.mark.starts, or its "
            "module with pytestmark = pytest.mark.starts"
        )


def _audit(event: str, _: Any) -> None:
    if event in EVENTS:
        _forbid(EVENTS[event])


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def start(*arguments: Any, **named: Any) -> Any:
        _forbid("process")
        return original(*arguments, **named)

    return start


def install() -> None:
    """Watch this process for its life. The starts of multiprocessing raise no audit event, so they are watched where they begin."""
    sys.addaudithook(_audit)
    multiprocessing.process.BaseProcess.start = _guarded(multiprocessing.process.BaseProcess.start)  # type: ignore[method-assign]
    multiprocessing.util.spawnv_passfds = _guarded(multiprocessing.util.spawnv_passfds)  # type: ignore[attr-defined]
