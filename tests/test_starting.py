"""The guard of tests/starting.py: nothing is started under `make check`."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import starting
from tests.tiny import ROOT


def _serve() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))


def _spawn() -> None:
    multiprocessing.get_context("spawn").Process(target=print).start()


PROCESSES: list[Callable[[], object]] = [lambda: subprocess.run([sys.executable, "-c", ""]), lambda: os.system("true"), os.fork, _spawn]


@pytest.mark.parametrize(
    ("start", "what"), [*((start, "process") for start in PROCESSES), (_serve, "server")], ids=["run", "system", "fork", "spawn", "bind"]
)
def test_what_starts_something_without_the_mark_is_told_which_mark(start: Callable[[], object], what: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=rf"starts a {what}, .*mark it with @pytest\.mark\.starts"):
        start()


@pytest.mark.starts
def test_what_has_the_mark_starts_what_it_likes() -> None:
    assert subprocess.run([sys.executable, "-c", ""]).returncode == 0
    _serve()


@pytest.mark.parametrize("fixture", sorted(starting.STARTING))
def test_a_test_is_marked_by_the_fixtures_that_it_asks_for(fixture: str, request: pytest.FixtureRequest) -> None:
    mine = request.node
    assert mine.get_closest_marker("starts") is None
    asking = pytest.Function.from_parent(mine.parent, name="asking", callobj=lambda: None)
    asking.fixturenames.append(fixture)
    starting.mark([asking])
    assert asking.get_closest_marker("starts") is not None


def test_two_processes_keep_together_what_shares_a_file_or_the_trained_run() -> None:
    order, prepare, quarantine = "tests/reactdiff/data/test_order.py", "tests/jobs/test_prepare.py", "tests/cluster/data/test_quarantine.py"
    assert starting.scope(f"{order}::test_a", slow=False) == starting.scope(f"{order}::test_b[1]", slow=False) == order
    assert starting.scope("tests/jobs/test_evaluate.py::test_a", slow=False) == starting.scope(f"{quarantine}::test_b", slow=False)
    assert starting.scope(f"{prepare}::test_a", slow=False) == prepare
    assert starting.scope(f"{quarantine}::test_b", slow=True) == quarantine


def test_make_check_leaves_out_what_starts_something_and_make_test_nothing_but_the_slow() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^quick:\n\t.* -m 'not slow and not starts and not heavy'", text, re.MULTILINE)
    assert re.search(r"^test: lint \$\(TOOLS\)\n\t\$\(PY\) -m pytest \$\(TWO\) \$\(ARGS\)$", text, re.MULTILINE)
