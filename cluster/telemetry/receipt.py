"""What a run has cost so far, from the books of its lives: time and money by state and by fault, and in words what binds it."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table

from cluster.storage import NotFound, Store
from cluster.telemetry.books import AGAIN, BOOK_STATES, Berth
from cluster.telemetry.books_log import DRIVER, ENDED, read_books

RECEIPT = "receipt.json"

SHOWN = {"loss": "loss", "val_frcorr": "FRCorr on val", "quarantined_items": "quarantined items"}
"""Gauges that a look at a run shows, and their names for people."""

COSTLIEST = 10
"""Faults that are told one by one: those that took the most time."""

SILENT = 30.0
"""Seconds without a record after which a driver is said to be silent."""

DOING = {"resized": "restart to grow", DRIVER: "driver lost"}
"""Classes of faults whose names say little -> words."""


def write_receipt(store: Store) -> dict[str, Any]:
    """Keep the receipt of a run as it is now in its folder, and return it."""
    made = receipt(read_books(store))
    store.put(RECEIPT, json.dumps(made, indent=1).encode())
    return made


def read_receipt(store: Store) -> dict[str, Any] | None:
    """The receipt that was kept last in a run's folder, None where there is none."""
    try:
        return json.loads(store.read(RECEIPT))
    except NotFound:
        return None


def receipt(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The receipt of a run, from the books of its lives.

    Returns:
        In plain JSON types: `lives`; `wall` and `away`, the seconds since the beginning and those without a driver; `held`, the seconds
        of all workers, which `states` and `stages` divide; `items`, `bytes`; `mfu` by stage, where the devices' peak is known; `money`
        by state, `cost`, and `unpriced`, the seconds on machines whose price nobody knows; `faults` with the seconds and the money that
        each took; `restarts` of ranks and drivers by class; `slowest`, the ranks that others waited for.
    """
    states, money, unpriced = defaultdict[str, float](float), defaultdict[str, float](float), 0.0
    stages: dict[str, defaultdict[str, float]] = {}
    faults = {fault["fault"]: {**fault, **dict.fromkeys((*AGAIN, "waiting", "cost"), 0.0)} for one in records for fault in one["faults"]}
    lost = {fault["life"]: fault["fault"] for fault in faults.values() if fault["class"] == DRIVER}
    for record in records:
        for stage, state, fault, berth, ms in (*record["lines"], *_pending(record, lost)):
            seconds, where = ms / 1000, record["berths"][berth]
            cost = Berth(**where).dollars(ms)
            states[state] += seconds
            stages.setdefault(stage, defaultdict(float))[state] += seconds
            money[state] += cost
            unpriced += seconds if where["price"] < 0 else 0.0
            if fault:
                faults.setdefault(fault, _unknown(fault, stage))
                faults[fault][state] += seconds
                faults[fault]["cost"] += cost
    work: dict[str, Counter[str]] = {}
    peaks: dict[str, float] = {}
    for record in records:
        peaks |= {stage: peak for stage, peak in record.get("peak", {}).items() if peak}
        for stage, done in record.get("work", {}).items():
            work.setdefault(stage, Counter()).update(done)
    held = {stage: sum(by.values()) - by["waiting"] for stage, by in stages.items()}
    waits: dict[tuple[str, int, str], dict[str, Any]] = {}
    for one in (one for record in records for one in record["slowest"]):
        same = waits.setdefault((one["stage"], one["rank"], one["node"]), {**one, "seconds": 0.0})
        same |= {"seconds": round(same["seconds"] + one["seconds"], 3), "ranks": max(same["ranks"], one["ranks"])}
    return {
        "lives": len(records),
        "wall": (records[-1]["until"] - records[0]["began"]) / 1000 if records else 0.0,
        "away": sum(max(0, new["began"] - old["until"]) for old, new in pairwise(records)) / 1000,
        "held": sum(held.values()),
        "states": {state: round(states[state], 3) for state in BOOK_STATES},
        "stages": {stage: {state: round(by[state], 3) for state in BOOK_STATES if by[state]} for stage, by in stages.items()},
        "items": {stage: done["items"] for stage, done in work.items()},
        "bytes": sum(done["bytes"] for done in work.values()),
        "mfu": {stage: work[stage]["flops"] / (peak * held[stage]) for stage, peak in peaks.items() if stage in work and held.get(stage)},
        "money": {state: money[state] for state in BOOK_STATES},
        "cost": sum(money.values()),
        "unpriced": round(unpriced, 3),
        "faults": list(faults.values()),
        "restarts": dict(Counter(fault["class"] for fault in faults.values() if fault.get("restarts", True))),
        "slowest": sorted(waits.values(), key=lambda one: -one["seconds"])[:3],
        "logs": "logs/",
    }


def _pending(record: Mapping[str, Any], lost: Mapping[int, str]) -> list[list[Any]]:
    """What a life had not booked when it was last seen: as it seemed, or lost with its driver, if a later life found that it was."""
    if (fault := lost.get(record["life"])) is None:
        return record.get("pending", [])
    return [[stage, state if state == "waiting" else "recovery", fault, berth, ms] for stage, state, _, berth, ms in record["pending"]]


def _unknown(fault: str, stage: str) -> dict[str, Any]:
    """A fault of a life whose books cannot be read."""
    life = int(fault.partition(".")[0])
    known = {"fault": fault, "class": "unknown", "stage": stage, "text": f"the books of life {life} cannot be read", "life": life}
    return {**known, "time": 0, "progress": 0.0, "restarts": False, **dict.fromkeys((*AGAIN, "waiting", "cost"), 0.0)}


def advice(made: Mapping[str, Any]) -> list[str]:
    """What binds a run and what to change, the heaviest first; at least one sentence."""
    states, held = made["states"], made["held"]
    if not held:
        return ["no worker has been held yet" + (": it waits for room" if states["waiting"] else "")]
    share = {state: states[state] / held for state in BOOK_STATES}
    lost, waited = share["recovery"] + share["replay"], states["waiting"] / (held + states["waiting"])
    blamed = max(made["faults"], key=lambda fault: fault["recovery"] + fault["replay"], default=None)
    found = [
        (share["data_wait"], 0.1, "of the time ranks wait for data: set data.cache, raise data.readers, or see to the store"),
        (share["checkpoint"], 0.05, "of the time goes to checkpoints: raise run.checkpoint_every, or give the store more bandwidth"),
        (lost, 0.05, f"of the time was lost to faults, most of it to {_named(blamed)}: {_cure(share)}"),
        (share["starting"], 0.2, "of the time ranks and tasks start: the run is short for that many starts, or loads from a slow disk"),
        (share["encode"], 0.25, "of the time goes to latents: give it more machines, or run.autoencoder, whose latents there are"),
        (share["evaluate"], 0.25, "of the time goes to scores: lower evaluation.watch, evaluation.clips or evaluation.predictions"),
        (share["idle"], 0.05, "of the time machines are held for nobody"),
        (waited, 0.2, "of the time there was no room: give workers.count a range, or ask for other machines"),
    ]
    said = [f"{part:.0%} {text}" for part, least, text in sorted(found, reverse=True) if part >= least]
    if made["slowest"] and (slow := made["slowest"][0])["seconds"] > 0.05 * held:
        said.append(
            f"rank {slow['rank']} on {slow['node']} ({slow['stage']}) kept {slow['ranks'] - 1} others waiting, for "
            f"{_time(slow['seconds'])} in all: see to its machine, or leave it out by workers.labels"
        )
    bound = f"{share['compute']:.0%} of the time is spent computing"
    faster = "more ranks, up to the items of a step, or a larger workers.micro_batch where memory allows, make it faster"
    return said or [f"{bound}: computing binds this run; {faster}"]


def receipt_text(made: Mapping[str, Any], width: int = 100) -> str:
    """A receipt for people, as a table of so many columns."""
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False, emoji=False).print(receipt_table(made))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


class ReceiptLines(NamedTuple):
    """A receipt in words: a line on the whole, the cells of the table of states, and a line a fault."""

    about: list[str]
    head: list[str]
    rows: list[list[str]]
    faults: list[str]


def receipt_lines(made: Mapping[str, Any]) -> ReceiptLines:
    """The words of a receipt; the last row of the table is the sum."""
    states, held, priced = made["states"], made["held"] or 1.0, made["cost"] > 0
    rows = []
    for state in BOOK_STATES:
        if states[state]:
            cells = [_time(by.get(state, 0.0)) if by.get(state) else "" for by in made["stages"].values()]
            share = "" if state == "waiting" else f"{states[state] / held:.1%}"
            rows.append([state.replace("_", " "), *cells, _time(states[state]), share, *[f"${made['money'][state]:.2f}"] * priced])
    totals = [_time(sum(seconds for state, seconds in by.items() if state != "waiting")) for by in made["stages"].values()]
    rows.append(["held", *totals, _time(made["held"]), "", *[f"${made['cost']:.2f}"] * priced])
    away = f", {_time(made['away'])} of it without a driver" if made["away"] >= 1 else ""
    work = ", ".join(f"{items:,} items of {stage}".replace(",", " ") for stage, items in made["items"].items())
    about = [f"{made['lives']} {'life' if made['lives'] == 1 else 'lives'}, {_time(made['wall'])} of wall time{away}"]
    about += [f"{work}; {made['bytes'] / 1e9:.2f} GB read by ranks"] if work else []
    about += [", ".join(f"MFU {value:.1%} of stage {stage}" for stage, value in made["mfu"].items())] if made["mfu"] else []
    about += ["restarts: " + ", ".join(f"{count} {_doing(kind)}" for kind, count in made["restarts"].items())] if made["restarts"] else []
    about += [f"no price is known for {_time(made['unpriced'])} of the time: telemetry.prices"] if priced and made["unpriced"] >= 1 else []
    costly = sorted(made["faults"], key=lambda fault: -sum(fault[state] for state in (*AGAIN, "waiting")))
    faults = [f"{_named(fault)} of {fault['stage']}: {_lost(fault, priced)}; {fault['text']}" for fault in costly[:COSTLIEST]]
    if rest := costly[COSTLIEST:]:
        sums = {key: sum(fault[key] for fault in rest) for key in (*AGAIN, "waiting", "cost")}
        faults.append(f"{len(rest)} more faults: {_lost(sums, priced)}")
    faults += [f"what each rank said and why it ended is in {made['logs']} of the run's folder"] if faults else []
    return ReceiptLines(about, ["state", *made["stages"], "all", "share", *["money"] * priced], rows, faults)


def receipt_table(made: Mapping[str, Any]) -> Group:
    """A receipt as rich shows it."""
    lines = receipt_lines(made)
    table = Table(*lines.head, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for number, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if number else "left", True
    for row in lines.rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*lines.rows[-1])
    return Group(f"receipt: {lines.about[0]}", *lines.about[1:], table, *advice(made), *lines.faults)


def live_table(records: Sequence[Mapping[str, Any]], silent: float) -> Group:
    """A run that goes on: where it is, and its receipt so far.

    Args:
        records: of its lives.
        silent: seconds since its driver wrote the last of them.
    """
    lines = []
    if records and ENDED not in (last := records[-1]):
        for stage, gauges in last.get("gauges", {}).items():
            numbers = [f"{gauges['progress_items']:.0f} items"] if "progress_items" in gauges else []
            numbers += [f"{name} {gauges[key]:.4g}" for key, name in SHOWN.items() if key in gauges]
            lines += [f"{stage}: {', '.join(numbers)}"] if numbers else []
        if silent > SILENT:
            lines.append(f"its driver has written nothing for {_time(silent)}: it is lost, or does not reach the store")
    return Group(*lines, receipt_table(receipt(records)))


def _named(fault: Mapping[str, Any] | None) -> str:
    return "" if fault is None else f"fault {fault['fault']} ({_doing(fault['class'])})"


def _doing(kind: str) -> str:
    return DOING.get(kind, kind)


def _lost(fault: Mapping[str, Any], priced: bool) -> str:
    parts = [f"{_time(fault[state])} {state}" for state in (*AGAIN, "waiting") if fault[state]]
    return ", ".join(parts or ["nothing lost"]) + (f", ${fault['cost']:.2f}" if priced else "")


def _cure(share: Mapping[str, float]) -> str:
    if share["replay"] > share["recovery"]:
        return "lower run.checkpoint_minutes or run.checkpoint_every, so that less is done again"
    return "see to what fails (state.json and the logs say it)"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"
