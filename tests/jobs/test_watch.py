"""What anybody sees of a run from its folder alone: live numbers, its receipt, its page."""

import json
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, Group

from cluster.config.loading import to_yaml
from cluster.runs.state import State, open_life, write_state
from cluster.storage import Store, open_store
from cluster.telemetry.books import Berth, Books
from infra.objectstore import ObjectStore
from jobs.watch import Silence, _look, follow
from tests.cluster.support.faulty import faulty_proxy
from tests.cluster.telemetry.test_meter import Clock
from tests.conftest import BUCKET
from tests.tiny import call, tiny


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run that trains, and whose books are from long ago."""
    store = open_store(str(tmp_path / "store" / "runs" / "one"))
    store.put("config.yaml", to_yaml(tiny(tmp_path / "shards", tmp_path / "store")).encode())
    write_state(store, State("RUNNING", open_life(store, {}), "d", "m", "diffusion"))
    clock = Clock(0.0)
    books = Books(1, clock)
    clock.now = 100.0
    books.book("diffusion", {"data_wait": 60_000, "compute": 40_000}, books.now(), Berth("host", 36.0, 1.0))
    record = books.record(stage="diffusion", gauges={"diffusion": {"progress_items": 40.0, "loss": 0.5}})
    store.put("books/000001.json", json.dumps(record).encode())
    return store


def test_a_run_is_watched_by_its_name_in_a_store_and_told_what_binds_it(run: Store, tmp_path: Path) -> None:
    said = call("watch", "one", "--store", tmp_path / "store").stdout
    assert f"{run.url}: RUNNING in diffusion, life 1" in said and "diffusion: 40 items, loss 0.5" in said
    assert "60.0%" in said and "$1.00" in said and "60% of the time ranks wait for data: set data.cache" in said
    assert "its driver has written nothing for" in said


@pytest.mark.starts
def test_a_store_that_is_away_is_said_above_what_was_seen_last_and_the_view_goes_on(
    run: Store, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/watched"
    for entry in run.list(""):
        open_store(url).put(entry.key, run.read(entry.key))
    said: list[str] = []

    def show(now: Group) -> None:
        console = Console(file=StringIO(), width=140)
        console.print(now)
        said.append(console.file.getvalue())  # type: ignore[attr-defined]

    def pause(seconds: float) -> None:
        if len(said) == 1:
            proxy.arm(["busy"])
        elif len(said) == 2:
            write_state(store, State("DONE", 1, "d", "m"))

    with faulty_proxy(object_store.endpoint) as proxy, ThreadPoolExecutor(1) as thread:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store, silence = open_store(url), Silence()
        thread.submit(follow, Group(), lambda: _look(store, silence), show, pause).result()
        assert proxy.happened == ["busy"], "a look is tried once"
    first, second, third = said
    assert "RUNNING in diffusion" in first and "60% of the time ranks wait for data" in first
    assert second.startswith("the store does not answer, and this was seen before:") and "60% of the time ranks wait for data" in second
    assert f"{url}: DONE" in third and "does not answer" not in third


def test_a_run_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = call("watch", "one", "--store", tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no run at ")


def test_a_page_is_made_of_a_run_that_goes_on(run: Store) -> None:
    assert call("report", run.url).stdout == f"{run.url}/report.html\n"
    assert "60% of the time ranks wait for data" in run.read("report.html").decode()
