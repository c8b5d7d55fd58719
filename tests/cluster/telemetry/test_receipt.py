"""The receipt: time and money of all lives, faults with what they cost, and a verdict that names what binds."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from cluster.telemetry.accounts import GroupBooks
from cluster.telemetry.books import NOWHERE, Berth, Books
from cluster.telemetry.books_log import ENDED, JOB, inherit, keeping, read_books
from cluster.telemetry.receipt import advice, live_table, receipt, receipt_text, write_receipt
from jobs.watch import Silence
from tests.cluster.telemetry.test_meter import Clock

GPU, CPU, UNKNOWN = Berth("gpu-1", 8.0, 0.25), Berth("cpu-1", 1.0, 0.5), Berth("mine")
HOUR = 3_600_000


def life(number: int, *booked: tuple[str, str, int, Berth], start: float = 0.0, seconds: float = 3600, **facts: Any) -> dict[str, Any]:
    """The record of a life of so many seconds; a state with a fault is written `recovery:class`."""
    clock = Clock(start)
    books = Books(number, clock)
    clock.now += seconds
    for stage, state, ms, berth in booked:
        state, _, kind = state.partition(":")
        books.book(stage, {state: ms}, books.now(), berth, books.fault(kind, stage, f"{kind} happened", restarts=True) if kind else "")
    return books.record(**facts)


def test_money_is_price_times_share_times_seconds_to_the_cent_and_what_has_no_price_is_said() -> None:
    made = receipt(
        [
            life(1, ("diffusion", "compute", HOUR, GPU), ("diffusion", "data_wait", HOUR // 2, GPU), ("latents", "encode", HOUR, CPU)),
            life(2, ("diffusion", "recovery:lost", HOUR // 4, GPU), ("diffusion", "waiting", HOUR, NOWHERE), start=4000),
            life(3, ("evaluation", "evaluate", 9000, UNKNOWN), start=9000),
        ]
    )
    money = {state: round(dollars, 2) for state, dollars in made["money"].items() if dollars}
    assert money == {"compute": 2.0, "data_wait": 1.0, "encode": 0.5, "recovery": 0.5} and made["cost"] == pytest.approx(4.0)
    assert made["unpriced"] == 9 and made["held"] == sum(made["states"].values()) - made["states"]["waiting"]
    assert (made["lives"], made["wall"], made["away"]) == (3, 9000 + 3600, 400 + 1400)
    assert [(fault["class"], fault["recovery"], fault["cost"]) for fault in made["faults"]] == [("lost", 900, 0.5)]
    said = receipt_text(made)
    assert "no price is known for 9.0 s" in said and "$4.00" in said and "fault 2.1 (lost) of diffusion: 15.0 min recovery, $0.50" in said


def test_work_of_all_lives_counts_and_mfu_is_of_the_time_that_devices_were_held() -> None:
    work = {"diffusion": {"items": 100, "bytes": 2e9, "flops": 9e15}}
    made = receipt([life(n, ("diffusion", "compute", HOUR, GPU), work=work, peak={"diffusion": 1e13}) for n in (1, 2)])
    assert made["items"] == {"diffusion": 200} and made["bytes"] == 4e9
    assert made["mfu"] == {"diffusion": pytest.approx(2 * 9e15 / (1e13 * 7200))}
    assert "200 items of diffusion; 4.00 GB read by ranks" in receipt_text(made) and "MFU 25.0% of stage diffusion" in receipt_text(made)


@pytest.mark.parametrize(
    "state, said",
    [
        ("compute", "100% of the time is spent computing: computing binds this run"),
        ("data_wait", "80% of the time ranks wait for data: set data.cache"),
        ("checkpoint", "80% of the time goes to checkpoints: raise run.checkpoint_every"),
        ("starting", "100% of the time ranks and tasks start"),
        ("encode", "80% of the time goes to latents"),
        ("evaluate", "80% of the time goes to scores: lower evaluation.watch"),
        ("idle", "80% of the time machines are held for nobody"),
        ("recovery:hang", r"80% of the time was lost to faults, most of it to fault 1.1 (hang): see to what fails"),
        ("replay:lost", r"80% of the time was lost to faults, most of it to fault 1.1 (lost): lower run.checkpoint_minutes"),
        ("waiting", "80% of the time there was no room: give workers.count a range"),
    ],
)
def test_the_verdict_names_what_binds_a_run_and_what_to_change(state: str, said: str) -> None:
    berth = NOWHERE if state == "waiting" else CPU
    rest = ("diffusion", "compute" if state != "starting" else "starting", 20, CPU)
    assert advice(receipt([life(1, ("diffusion", state, 80, berth), rest)]))[0].startswith(said)


def test_a_rank_that_the_others_wait_for_is_in_the_verdict() -> None:
    record = life(1, ("diffusion", "compute", 100_000, CPU))
    record["slowest"] = [{"stage": "diffusion", "rank": 3, "node": "cpu-1", "seconds": 30.0, "ranks": 8}]
    assert "rank 3 on cpu-1 (diffusion) kept 7 others waiting, for 30.0 s in all" in advice(receipt([record]))[0]


def test_a_table_of_all_steps_has_room_on_eighty_columns() -> None:
    steps = ("autoencoder", "latents", "diffusion", "evaluation")
    said = receipt_text(receipt([life(1, *((step, "checkpoint", 599_900, GPU) for step in steps))]), width=80)
    assert "checkpoint     599.9 s 599.9 s   599.9 s    599.9 s 40.0 min 100.0% $1.33" in said


def test_a_run_that_has_held_nobody_has_a_receipt() -> None:
    assert advice(receipt([])) == ["no worker has been held yet"]
    assert "0.0 s of wall time" in receipt_text(receipt([life(1, seconds=0)]))


def test_a_driver_that_is_silent_is_said_so_and_one_that_has_ended_is_not() -> None:
    def text(record: dict[str, Any], silent: float) -> str:
        return "\n".join(str(one) for one in live_table([record], silent).renderables)

    there = {"gauges": {"diffusion": {"progress_items": 40.0, "loss": 0.5}}}
    assert "diffusion: 40 items, loss 0.5" in text(life(1, **there), 1) and "nothing for" not in text(life(1, **there), 1)
    assert "has written nothing for 100.0 s" in text(life(1), 100)
    assert "nothing for" not in text(life(1, **{ENDED: "DONE"}), 100)


def test_a_driver_whose_clock_is_another_is_silent_only_where_it_writes_nothing() -> None:
    clock = Clock(0.0)
    silence, behind = Silence(clock), 1000 * int(time.time()) - 40_000
    assert silence.after(behind) >= 39, "the first look has nothing else to go by"
    clock.now = 2.0
    assert silence.after(behind + 2000) == 0
    clock.now = 34.0
    assert silence.after(behind + 2000) == 32


def test_the_books_of_a_life_are_kept_while_it_lasts_and_as_they_are_at_its_end(tmp_path: Path) -> None:
    store, clock = open_store(str(tmp_path)), Clock(0.0)
    books, facts = Books(7, clock), {"stage": "diffusion"}
    with keeping(store, books, lambda: facts):
        assert read_books(store)[0]["lines"] == []
        clock.now = 5.0
        books.book("diffusion", {"compute": 5000}, books.now(), CPU)
        facts[ENDED] = "DONE"
    (record,) = read_books(store)
    assert record["life"] == 7 and record[ENDED] == "DONE" and record["until"] == 5000 and record["lines"][0][-1] == 5000
    made = write_receipt(store)
    assert made["cost"] == pytest.approx(1.0 * 0.5 * 5 / 3600) and open_store(str(tmp_path)).exists("receipt.json")


def test_books_that_cannot_be_read_do_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(tmp_path))
    store.put("books/000001.json", b'{"version": 1, "li')
    store.put("books/000002.json", b'{"version": 9}')
    store.put("books/000003.json", json.dumps(life(3, ("diffusion", "compute", 10, CPU))).encode())
    assert [record["life"] for record in read_books(store)] == [3]
    assert caplog.text.count("are no books of version 1: its life is not in the receipt") == 2


@pytest.mark.parametrize(("job", "seconds"), [(None, 2.0), (["session", "01"], 0.75), (["another", "01"], 2.0)])
def test_a_life_after_a_lost_driver_has_that_fault_with_the_seconds_that_nobody_wrote_down(job: list[str] | None, seconds: float) -> None:
    clock = Clock(0.0)
    lost = Books(1, clock)
    lost.furthest["diffusion"] = 40.0
    GroupBooks(lost, "diffusion", [CPU, GPU], 0.0)
    clock.now = 100.0
    record = lost.record(stage="diffusion", **({JOB: job} if job else {}))
    clock.now = 160.0
    books = Books(2, clock)
    known = {("session", "01"): record["until"] + 750}
    assert inherit(books, [record], lambda *job: known.get(job)) == {"diffusion": "2.1"} and books.furthest == {"diffusion": 40}
    made = receipt([record, books.record()])
    assert made["states"]["recovery"] == 2 * (100 + seconds) and made["faults"][0]["class"] == "driver" and made["away"] == 60
    assert made["faults"][0]["text"] == "the driver of life 1 was lost"


@pytest.mark.parametrize("fatal, faults", [("", {}), ("hang", {"diffusion": "1.1"}), ("storage", {"diffusion": "1.2"})])
def test_a_life_that_ended_by_a_fault_hands_it_on_and_one_that_healed_it_does_not(fatal: str, faults: dict[str, str]) -> None:
    books = Books(1, Clock(0.0))
    books.fault("hang", "diffusion", "rank 1 hangs")
    if fatal:
        books.ends(fatal, "diffusion", "rank 1 hangs")
    record = books.record(**{ENDED: "FAILED" if fatal else "STOPPED"})
    assert inherit(Books(2, Clock(0.0)), [record]) == faults


def test_a_fault_of_a_life_whose_books_are_gone_stops_nothing() -> None:
    books = Books(2, Clock(0.0))
    books.book("diffusion", {"recovery": 7000}, 7000, CPU, "1.3")
    (fault,) = receipt([books.record()])["faults"]
    assert (fault["class"], fault["recovery"], fault["life"]) == ("unknown", 7, 1)


def test_the_costliest_faults_are_told_one_by_one_behind_the_verdict_and_the_rest_in_a_line() -> None:
    made = receipt([life(1, *(("diffusion", "recovery:lost", 1000 * (1 + number), CPU) for number in range(14)))])
    said = receipt_text(made)
    assert said.count("(lost) of diffusion") == 10 and "4 more faults: 10.0 s recovery" in said and "restarts: 14 lost" in said
    assert said.index("was lost to faults") < said.index("(lost) of diffusion") < said.index("4 more faults")


def test_ranks_that_others_waited_for_in_one_group_after_the_other_are_summed() -> None:
    slow = {"stage": "diffusion", "rank": 1, "node": "h", "seconds": 4.0, "ranks": 3}
    made = receipt([life(1) | {"slowest": [slow, {**slow, "rank": 0, "seconds": 5.0}]}, life(2) | {"slowest": [{**slow, "ranks": 4}]}])
    assert made["slowest"][0] == {**slow, "seconds": 8.0, "ranks": 4}
