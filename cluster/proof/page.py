"""What came of many proofs: each fault as a row of a CSV file, and together as tables of a page."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from cluster.proof.comparison import Endured
from cluster.proof.prove import Proof
from cluster.proof.script import kind_name
from cluster.studies.marked_page import assert_marked, put_between

PROOFS_MARK = "<!-- proofs -->"

VERDICT = "verdict"
"""Stands for a fault in the last row of a seed."""


@dataclass(frozen=True)
class ProofRow:
    """A fault of a seed's script or, last, its verdict, as the CSV file has it.

    Attributes:
        seed: of the script.
        fault: its kind, or `verdict`.
        where: the host.
        when: stage and step; of a verdict, how many steps were compared.
        noticed_s: seconds until ranks or driver were started again, empty where nothing was.
        going_s: seconds until the run trained (again), empty where it was not seen to.
        lost_items: that were trained on again.
        went_on: by itself or how; of a verdict, the content hash of each stage's weights, or why not.
    """

    seed: str
    fault: str
    where: str
    when: str
    noticed_s: str
    going_s: str
    lost_items: str
    went_on: str


class ProofsPage:
    """Keeps proofs in `<page>`'s folder as proofs.csv, and their tables in the page."""

    def __init__(self, page: Path):
        """Write nothing yet.

        Raises:
            ValueError: if the page has no place for the tables.
        """
        assert_marked(page, PROOFS_MARK)
        self._page = page
        self._file = page.with_name("proofs.csv")

    def keep(self, seed: int, proof: Proof) -> None:
        """In place of what was kept of this seed."""
        rows = [row for row in self.rows() if row.seed != str(seed)] + proof_rows(seed, proof)
        rows.sort(key=lambda row: int(row.seed))
        with self._file.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(ProofRow)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        put_between(self._page, PROOFS_MARK, tables(rows))

    def rows(self) -> list[ProofRow]:
        """What is kept."""
        if not self._file.is_file():
            return []
        with self._file.open(newline="") as file:
            return [ProofRow(**row) for row in csv.DictReader(file)]


def proof_rows(seed: int, proof: Proof) -> list[ProofRow]:
    """A row for each fault that happened, and the verdict."""
    faults = [_fault_row(seed, one) for one in proof.endured]
    same = proof.sameness
    steps, end = (f"{same.steps} steps", _weights(same.weights)) if same else ("", proof.why)
    verdict = "PROVEN" if proof.proven else "NOT PROVEN"
    return [*faults, ProofRow(str(seed), VERDICT, "", steps, "", "", "", f"{verdict}: {end}")]


def tables(rows: Sequence[ProofRow]) -> str:
    """The faults by kind, median, least and most over the seeds; and a line for each seed."""
    by_kind: dict[str, list[ProofRow]] = {}
    for row in rows:
        by_kind.setdefault(row.fault, []).append(row)
    verdicts = by_kind.pop(VERDICT, [])
    kinds = ["| fault | times | noticed after | went on after | items lost | went on |", "|---|---|---|---|---|---|"]
    for kind, found in sorted(by_kind.items()):
        seconds = [_spread([row.noticed_s for row in found], " s"), _spread([row.going_s for row in found], " s")]
        ways = ", ".join(sorted({row.went_on for row in found}))
        kinds.append(f"| {kind} | {len(found)} | {' | '.join(seconds)} | {_spread([row.lost_items for row in found], '')} | {ways} |")
    seeds = ["| seed | ledger compared | verdict, and weights of both runs |", "|---|---|---|"]
    seeds += [f"| {row.seed} | {row.when} | {row.went_on} |" for row in verdicts]
    return "\n".join([*kinds, "", *seeds])


def _fault_row(seed: int, one: Endured) -> ProofRow:
    noticed, going = ("" if seconds == math.inf else f"{seconds:.1f}" for seconds in (one.noticed, one.going))
    when = f"{one.fault.stage} {one.step}"
    return ProofRow(str(seed), kind_name(one.fault), one.host, when, noticed, going, str(one.items), one.how)


def _weights(weights: Mapping[str, str]) -> str:
    return ", ".join(f"{stage} {digest}" for stage, digest in weights.items())


def _spread(values: Sequence[str], unit: str) -> str:
    numbers = [float(value) for value in values if value]
    if not numbers:
        return "–"
    digits = 1 if unit else 0
    middle, least, most = (f"{number:.{digits}f}" for number in (median(numbers), min(numbers), max(numbers)))
    return f"{middle}{unit} ({least} to {most})"
