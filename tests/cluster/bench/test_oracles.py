"""The ladder of oracles, scored without a dataset on disk."""

import numpy as np

from cluster.bench.oracles import BESIDE, score_oracles
from cluster.studies.comparison_table import markdown
from reactdiff.data.synthetic.oracles import ladder
from reactdiff.data.synthetic.simulation import Simulation
from tests.tiny import ROOT


def test_every_oracle_has_a_row_and_who_knows_more_scores_more() -> None:
    told: list[tuple[int, int]] = []
    rows = score_oracles(Simulation(frames=100, clips={"train": 4, "test": 6}), "test", 2, (0, 50), lambda *done: told.append(done))
    assert told[-1] == (12, 12)
    assert list(rows) == ["random listener", "retrieval", "online retrieval 50", *dict.fromkeys([*ladder(0), *ladder(50)])]
    found = {name: row.seeds[0].metrics() for name, row in rows.items()}
    assert found["random listener"]["FRCorr"] < found["oracle"]["FRCorr"] < found["oracle told the script"]["FRCorr"]
    assert found["oracle mean of 100"]["FRDiv"] == 0 and np.isfinite(found["online oracle 50 mean of 4"]["EnergyScore"])
    table = markdown(rows)
    assert "| online oracle 50 told the turns |" in table and "way to oracle" in table and "parameters" not in table


def test_the_page_has_the_rows_that_are_made_now() -> None:
    rows = score_oracles(Simulation(frames=100, clips={"train": 1, "test": 1}), "test", 2, BESIDE, lambda *_: None)
    _, table, _ = (ROOT / "docs" / "science.md").read_text().split("<!-- oracles -->")
    head, _, *lines = table.strip().splitlines()
    made, _, *_ = markdown(rows).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(rows)
    assert head == made
