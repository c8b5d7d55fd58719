"""What ranks said is kept: their last lines, why they ended, never much, and little of one that is well."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.runs import logs
from cluster.runs.logs import RankLog, log_folder, make_room, rank_log, write_end
from cluster.storage import Store, open_store
from tests.cluster.telemetry.test_meter import Clock
from tests.tiny import ROOT

KEY = "logs/000001.0/diffusion-rank-0.log"
log = logging.getLogger("cluster.test")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def text(store: Store) -> str:
    return store.read(KEY).decode()


def test_a_rank_that_is_well_says_that_it_began_and_that_it_ended(folder: Store) -> None:
    with rank_log(folder, KEY, 2, "rank 0 of 2"):
        log.info("of no concern")
    began, ended = text(folder).splitlines()
    assert began.endswith("rank 0 of 2") and ended.endswith("ended")
    log.warning("nobody listens any more")
    assert len(text(folder).splitlines()) == 2


def test_what_ends_a_rank_is_in_its_log(folder: Store) -> None:
    with pytest.raises(ValueError), rank_log(folder, KEY, 2, "rank 0 of 2"):
        log.warning("the store is slow")
        raise ValueError("no such clip")
    assert "WARNING cluster.test: the store is slow" in text(folder)
    assert "Traceback" in text(folder) and text(folder).endswith("ValueError: no such clip\n\n")


def test_a_message_that_comes_again_and_again_is_a_line_a_minute_with_their_number(folder: Store) -> None:
    clock = Clock(0.0)
    kept = RankLog(folder, KEY, 1, clock)
    logger = logging.getLogger("cluster.often")
    logger.addHandler(kept)
    for second in range(130):
        clock.now = second
        logger.warning("try %d", second)
    logger.removeHandler(kept)
    kept.write()
    said = [line.partition("often: ")[2] for line in text(folder).splitlines()]
    assert said == ["try 0", "try 60 (59 more of these since the last one)", "try 120 (59 more of these since the last one)"]


def test_the_last_lines_stay_where_there_are_too_many_and_all_ranks_share_the_room(folder: Store) -> None:
    kept = RankLog(folder, KEY, ranks=1000)
    for number in range(1000):
        kept.say(f"line {number}")
    kept.write()
    assert len(folder.read(KEY)) <= logs.ALL_BYTES // 4 // 1000 and text(folder).endswith("line 999\n")
    kept.say("x" * 100_000)
    kept.write()
    assert len(folder.read(KEY)) == logs.ALL_BYTES // 4 // 1000


def test_the_oldest_attempts_make_room(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ALL_BYTES", 400)
    for life, attempt in ((1, 0), (1, 1), (2, 0), (10, 0)):
        folder.put(f"{log_folder(life, attempt)}/diffusion-rank-0.log", bytes(120))
    make_room(folder)
    assert sorted({entry.key.split("/")[1] for entry in folder.list("logs/")}) == ["000002.0", "000010.0"]
    folder.put(f"{log_folder(10, 0)}/diffusion-rank-1.log", bytes(1000))
    make_room(folder)
    assert {entry.key.split("/")[1] for entry in folder.list("logs/")} == {"000010.0"}, "the newest one's stay"


def test_many_small_logs_make_room_too(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ALL_LOGS", 40)
    for attempt in range(5):
        for rank in range(10):
            folder.put(f"{log_folder(1, attempt)}/diffusion-rank-{rank}.log", b"x")
    make_room(folder)
    assert {entry.key.split("/")[1] for entry in folder.list("logs/")} == {"000001.2", "000001.3", "000001.4"}


def test_why_a_group_ended_is_kept_beside_its_ranks_logs(folder: Store) -> None:
    write_end(folder, 3, 1, "diffusion", "hang, rank 1 on host")
    assert folder.read("logs/000003.1/diffusion-end.txt") == b"hang, rank 1 on host\n"


@pytest.mark.starts
def test_the_last_lines_of_a_rank_that_is_killed_are_there(tmp_path: Path) -> None:
    code = (
        "import logging, sys, time\nfrom cluster.runs.logs import rank_log\nfrom cluster.storage import open_store\n"
        f"with rank_log(open_store(sys.argv[1]), {KEY!r}, 1, 'rank 0'):\n"
        "    logging.getLogger('cluster').warning('about to be killed')\n    time.sleep(600)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    while not (tmp_path / KEY).exists():
        assert rank.poll() is None
        time.sleep(0.05)
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    assert "about to be killed" in (tmp_path / KEY).read_text() and "ended" not in (tmp_path / KEY).read_text()
