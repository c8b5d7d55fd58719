"""Which tests start a process, Ray or a server (mark `starts`), and a guard that holds all others to their word.

`make check` runs the others. A test is marked by what it asks for: every fixture of STARTING starts something. What a test starts
with its own hands is marked by hand.
"""

import multiprocessing.process
import multiprocessing.util
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

STARTING = {"object_store", "local_ray", "shards", "finished", "every_split"}
"""The fixtures that start something; whoever asks for them through others is found too."""

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
    """Mark the tests whose fixtures start something, and say which tests two processes keep together.

    Those that share a Ray, a server or a trained run stay together, or both processes would have them; others share what their module
    makes. The slow ones start clusters of their own, so they only share what their module makes.
    """
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        starts = STARTING & set(getattr(item, "fixturenames", ())) or parameters.get("store") == "s3"
        if starts:
            item.add_marker("starts")
        shared = starts and item.get_closest_marker("slow") is None
        item.add_marker(pytest.mark.xdist_group("shared" if shared else item.nodeid.partition("::")[0]))


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
