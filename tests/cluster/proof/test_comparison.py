"""Two runs are compared by what they left; what differs is named by its positions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.proof.comparison import Endured, Trace, compare_traces, faults_table, steps_a_second
from cluster.runtime.faults import at
from cluster.storage import open_store

WHOLE = Trace({"autoencoder": "aa", "diffusion": "bb"}, {"autoencoder": {6: (11.0, 2.0), 12: (22.0, 1.0)}, "diffusion": {6: (33.0, 4.0)}})


def test_equal_runs_are_proven() -> None:
    same = compare_traces(WHOLE, WHOLE, placement=True)
    assert same.proven
    assert same.sentences[0] == "weights: identical (autoencoder aa, diffusion bb)"
    assert same.sentences[1].startswith("ledger: equal in all 3 steps")


def test_other_weights_are_not_proven_where_the_placement_was_the_same() -> None:
    other = replace(WHOLE, weights={"autoencoder": "aa", "diffusion": "xx"})
    same = compare_traces(WHOLE, other, placement=True)
    assert not same.proven
    assert same.sentences[0] == "weights: NOT identical (diffusion xx and not bb)"


def test_another_placement_is_proven_by_its_ledger_and_told_with_the_largest_difference() -> None:
    rows = {"autoencoder": {6: (11.0, 2.0), 12: (22.0, 1.01)}, "diffusion": {6: (34.0, 9.0)}}
    other = Trace({"autoencoder": "cc", "diffusion": "xx"}, rows)
    same = compare_traces(WHOLE, other, placement=False)
    assert same.proven
    assert same.sentences[0] == "weights: of another placement; the largest difference of a step's loss is 0.01 of it"
    assert same.sentences[-1] == "stage diffusion was trained on latents of other last bits: its ledger says nothing"


def test_a_ledger_that_differs_is_named_by_its_positions_and_so_is_a_step_that_is_missing() -> None:
    other = replace(WHOLE, rows={"autoencoder": {6: (11.0, 2.0), 12: (23.0, 1.0)}, "diffusion": {}})
    for placement in (True, False):
        same = compare_traces(WHOLE, other, placement)
        assert not same.proven
        assert same.sentences[1:] == [
            "ledger: differs in 2 of 3 steps:",
            "  autoencoder, positions 6 to 11: 23 and not 22",
            "  diffusion, positions 0 to 5: no step and not 33",
        ]


def test_runs_that_left_nothing_prove_nothing() -> None:
    assert not compare_traces(Trace({}, {}), Trace({}, {}), placement=True).proven


def test_the_table_has_a_line_for_each_fault() -> None:
    one = Endured(at(step=7).kill(rank=1), "h2", 9, "process 4 is gone", 6.04, 14.2, 54, "by itself")
    two = Endured(at(step=30, stage="diffusion").cut_store(seconds=30), "store", 31, "pulled", math.inf, 31.0, 0, "by itself")
    assert faults_table([one, two]).splitlines() == [
        "| fault  | where | when          | noticed after | went on after | work lost | went on   |",
        "| ---    | ---   | ---           | ---           | ---           | ---       | ---       |",
        "| kill   | h2    | autoencoder 9 | 6.0 s         | 14.2 s        | 54 items  | by itself |",
        "| s3_30s | store | diffusion 31  | –             | 31.0 s        | 0 items   | by itself |",
    ]


def test_the_speed_of_a_run_is_its_rows_by_their_times(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    assert steps_a_second(run, ["autoencoder"]) == 0
    for stage, seconds in (("autoencoder", 0.5), ("diffusion", 0.1)):
        for first in (1, 4):  # segments of three rows
            rows = [{"stage": stage, "progress": 6 * step, "time": 100 + seconds * step} for step in range(first, first + 3)]
            run.put(f"metrics/000001.0/{stage}-{6 * first:015d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert steps_a_second(run, ["autoencoder"]) == pytest.approx(2)
    assert steps_a_second(run, ["autoencoder", "diffusion"]) == pytest.approx(10)
