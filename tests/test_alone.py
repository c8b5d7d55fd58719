"""Who is alone on the machine, and who waits."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from tests.alone import beside_others


def test_tests_run_beside_each_other_until_one_waits_to_be_alone_which_nobody_overtakes(tmp_path: Path) -> None:
    order, go = list[str](), Event()

    def run(name: str, alone: bool, until: Event | None = None) -> None:
        with beside_others(tmp_path, alone):
            order.append(name)
            if until:
                assert until.wait(60)
            order.append(f"{name} ends")

    def waits() -> bool:
        with (tmp_path / "turn").open("w") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(run, "first", False, go)
        while not order:
            pass
        run("beside", False)
        lonely = threads.submit(run, "alone", True)
        while not waits():
            pass
        last = threads.submit(run, "last", False)
        assert order == ["first", "beside", "beside ends"]
        go.set()
        for one in (first, lonely, last):
            one.result(60)
    assert order == ["first", "beside", "beside ends", "first ends", "alone", "alone ends", "last", "last ends"]
