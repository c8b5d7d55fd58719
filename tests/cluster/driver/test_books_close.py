"""The books of a real run against Ray's own tables of placement groups: a slow store, a killed rank, a lost machine, a killed driver."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions

from cluster.telemetry.books_log import read_books
from cluster.telemetry.receipt import receipt
from infra.objectstore import ObjectStore
from tests.cluster.data.test_stream_faults import copy
from tests.cluster.support.faulty import TAR_RANGE, faulty_proxy
from tests.cluster.support.machines import STAGE, Running, machines

PRICE = 36.0
"""Dollars an hour of a machine, which a rank has for itself: a cent a second."""

LOOK = 0.02
"""Seconds between two looks at Ray's table."""


class Held:
    """Seconds of all bundles of all placement groups that are there, as Ray tells."""

    def __init__(self, address: str):
        self.seconds, self._done = 0.0, threading.Event()
        self._state = GlobalState()
        self._state._initialize_global_state(
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        before, was = time.monotonic(), 0
        while not self._done.wait(LOOK):
            groups = self._state.placement_group_table().values()
            # Of a group that has lost a machine Ray still holds the places on the others.
            placed = (one["bundles_to_node_id"] for one in groups if one["state"] in ("CREATED", "RESCHEDULING"))
            there = sum(bool(node) for nodes in placed for node in nodes.values())
            now = time.monotonic()
            self.seconds += (now - before) * (there + was) / 2
            before, was = now, there

    def close(self) -> None:
        self._done.set()
        self._thread.join()


@contextmanager
def held(address: str) -> Iterator[Held]:
    seen = Held(address)
    try:
        yield seen
    finally:
        seen.close()


@pytest.mark.slow
@pytest.mark.alone  # half a percent of the seconds between two looks
@pytest.mark.timeout(1800)
def test_states_sum_to_the_seconds_that_ray_held_places_and_money_to_their_price(
    shards: Path, s3_url: str, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(shards, s3_url)
    data = (f"data.url={s3_url}", "data.read_ahead=1")
    command = (shards, tmp_path, "books", "workers.count=[1,2]", f"telemetry.prices={{any: {PRICE}}}", "optim.epochs=50", *data)
    with faulty_proxy(object_store.endpoint) as slow, machines(2, environment={"AWS_ENDPOINT_URL": slow.endpoint}) as there:
        slow.delay = 0.5
        slow.arm(["late", *[""] * 9] * 10_000, TAR_RANGE)
        monkeypatch.setenv("AWS_ENDPOINT_URL", slow.endpoint)
        there.wait(2)
        with held(there.address) as seen:
            run = Running(*command, address=there.address)
            run.until(lambda: run.progress >= 240)
            run.rank(1).kill()
            run.until_said("failed (lost)")
            reached = run.progress
            run.until(lambda: run.progress > reached + 240)
            there.kill()
            run.until_said("1 of at most 2 ranks")
            reached = run.progress
            run.until(lambda: run.progress > reached + 240)
            run.kill()
            again = Running(*command, address=there.address)
            assert again.end() == 0, again.said
    made = receipt(read_books(run.store))
    assert slow.happened.count("late") > 10 and made["states"]["data_wait"] > 5, "the store was slow, and it is told"
    assert [fault["class"] for fault in made["faults"]] == ["lost", "lost", "driver"]
    assert all(fault["recovery"] > 0 for fault in made["faults"]) and sum(fault["replay"] for fault in made["faults"]) > 0
    assert made["held"] == pytest.approx(seen.seconds, rel=0.005)
    assert made["cost"] == pytest.approx(seen.seconds * PRICE / 3600, rel=0.005)
    assert made["cost"] == pytest.approx(made["held"] * PRICE / 3600, abs=0.01), "to the cent"
    assert made["lives"] == 2
    assert "receipt: 2 lives" in again.said and json.loads((run.folder / "receipt.json").read_text())["cost"] == made["cost"]
    assert {path.name for path in run.folder.glob("logs/*/*-end.txt")} == {f"{STAGE}-end.txt"}
