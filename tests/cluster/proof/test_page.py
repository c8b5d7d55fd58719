"""What many proofs came to, kept by seed and shown as tables."""

import csv
import math
from pathlib import Path

import pytest

from cluster.proof.comparison import Endured, Sameness
from cluster.proof.page import PROOFS_MARK, ProofsPage
from cluster.proof.prove import Proof
from cluster.runtime.faults import at

KILL, CUT = at(step=7).kill(rank=1), at(step=30, stage="diffusion").cut_store(seconds=30)


def proof(noticed: float) -> Proof:
    killed = Endured(KILL, "h2", 9, "process 4 is gone", noticed, noticed + 8, 54, "by itself")
    cut = Endured(CUT, "store", 31, "pulled", math.inf, 31.0, 0, "by itself")
    return Proof([killed, cut], Sameness(True, ["weights: identical"], 40, {"autoencoder": "aa", "diffusion": "bb"}))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{PROOFS_MARK}\nold\n{PROOFS_MARK}\nafter\n")
    return page


def test_each_fault_is_a_row_and_each_kind_a_line_over_all_seeds(page: Path) -> None:
    proofs = ProofsPage(page)
    proofs.keep(10, proof(2.0))
    proofs.keep(9, proof(1.0))
    with page.with_name("proofs.csv").open() as file:
        rows = list(csv.DictReader(file))
    faults = ["kill", "s3_30s", "verdict"]
    assert [(row["seed"], row["fault"]) for row in rows] == [(seed, fault) for seed in ("9", "10") for fault in faults]
    assert rows[0] == dict(
        seed="9", fault="kill", where="h2", when="autoencoder 9", noticed_s="1.0", going_s="9.0", lost_items="54", went_on="by itself"
    )
    assert page.read_text().splitlines() == [
        "before",
        PROOFS_MARK,
        "| fault | times | noticed after | went on after | items lost | went on |",
        "|---|---|---|---|---|---|",
        "| kill | 2 | 1.5 s (1.0 to 2.0) | 9.5 s (9.0 to 10.0) | 54 (54 to 54) | by itself |",
        "| s3_30s | 2 | – | 31.0 s (31.0 to 31.0) | 0 (0 to 0) | by itself |",
        "",
        "| seed | ledger compared | verdict, and weights of both runs |",
        "|---|---|---|",
        "| 9 | 40 steps | PROVEN: autoencoder aa, diffusion bb |",
        "| 10 | 40 steps | PROVEN: autoencoder aa, diffusion bb |",
        PROOFS_MARK,
        "after",
    ]


def test_a_seed_that_is_proven_again_stands_once_and_a_failure_is_kept_as_such(page: Path) -> None:
    ProofsPage(page).keep(9, proof(1.0))
    ProofsPage(page).keep(9, Proof(proof(3.0).endured, None, "nothing was heard of it"))
    assert "| kill | 1 | 3.0 s" in page.read_text()
    assert "| 9 |  | NOT PROVEN: nothing was heard of it |" in page.read_text() and "| PROVEN" not in page.read_text()


def test_a_page_without_marks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md is no file with two lines <!-- proofs -->"):
        ProofsPage(tmp_path / "page.md")
