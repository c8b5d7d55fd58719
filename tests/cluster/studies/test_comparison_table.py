"""The table of what a comparison's rows reach."""

import re
from dataclasses import replace

import numpy as np

from cluster.studies.comparison_table import TableRow, markdown
from cluster.studies.kept_scores import ClipScores
from reactdiff.data.keyed import generator
from reactdiff.data.synthetic.oracles import frontier_names
from reactdiff.metrics.official import score_part
from reactdiff.metrics.partial import PER_CLIP


def scored(seed: int, noise: float) -> ClipScores:
    """Predictions that are the real reaction, with so much noise."""
    real = generator("real").random((6, 60, 25), dtype=np.float32)
    pred = real[:, None] + noise * generator("noise", seed).standard_normal((6, 2, 60, 25), dtype=np.float32)
    return ClipScores.of(score_part(pred, real, real, [np.array([clip]) for clip in range(6)]))


def table(**rows: TableRow) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The columns of the table, and its lines by name and column."""
    made = markdown({name.replace("_", " "): row for name, row in rows.items()})
    head, _, *lines = (line.removesuffix(" |") for line in made.splitlines())
    columns = head.split(" | ")[1:]
    return columns, {
        name.removeprefix("| "): dict(zip(columns, cells, strict=True)) for name, *cells in (line.split(" | ") for line in lines)
    }


def test_the_table_says_how_far_each_row_has_come_between_random_listener_and_oracle() -> None:
    model = TableRow({1: scored(1, 0.5), 2: scored(2, 0.5)}, 0, (1234567, 0.5, 2.5))
    columns, cells = table(
        model=model, random_listener=TableRow({1: scored(1, 3.0)}), oracle=TableRow(dict.fromkeys((1, 2), scored(1, 0.1)))
    )
    way = "way to oracle"
    assert cells["random listener"][way] == "0%" and cells["oracle"][way] == "100%"
    assert 0 < int(cells["model"][way].removesuffix("%")) < 100
    low, high = map(float, cells["model"]["95 % over clips"].split(" .. "))
    mean, spread = map(float, re.findall(r"[\d.]+", cells["model"]["FRCorr ↑"]))
    assert low < mean < high and spread > 0 and "±" not in cells["oracle"]["FRCorr ↑"], "the oracle is the same under both seeds here"
    assert cells["model"]["parameters"] == "1,234,567" and cells["oracle"]["parameters"] == ""
    assert (cells["model"]["GFLOP / item"], cells["model"]["TFLOP, all training"]) == ("0.5", "2.5")
    assert "share of frontier (95 %)" not in columns, "there is no frontier here"
    assert float(cells["model"]["energy score ↓"].split()[0]) < float(cells["random listener"]["energy score ↓"])
    assert float(cells["model"]["steps inside"].split()[0]) > 1 and "at ends" in columns


def test_a_model_is_compared_with_the_frontier_of_oracles_of_its_own_chunk() -> None:
    rows = {name: TableRow({1: scored(1, noise)}) for name, noise in zip(frontier_names(50), (0.5, 0.4, 0.3, 0.2, 0.1), strict=True)}
    best = {"oracle": TableRow({1: scored(1, 0.1)}), "random_listener": TableRow({1: scored(1, 3.0)})}
    _, cells = table(online=TableRow({1: scored(1, 0.5)}, 50), offline=TableRow({1: scored(1, 0.5)}, 0), **rows | best)
    assert cells["online"]["way to oracle"] == "100%" != cells["offline"]["way to oracle"], "nor with an oracle that hears earlier"
    assert cells["online oracle 50"]["way to oracle"] == cells["offline"]["way to oracle"]
    assert cells["online"]["share of frontier (95 %)"] == "100% (100% .. 100%)", "it is the frontier's own first point"
    assert cells["offline"]["share of frontier (95 %)"] == ""


def test_a_model_that_is_behind_retrieval_in_energy_score_is_told_so() -> None:
    good, bad = TableRow({1: scored(1, 0.1)}, 0), TableRow({1: scored(1, 0.9)}, 0)
    _, cells = table(good=good, bad=bad, retrieval=TableRow({1: scored(1, 0.5)}), oracle=TableRow({1: scored(1, 0.95)}))
    said = {name: cells[name]["energy score ↓"].endswith("behind retrieval") for name in cells}
    assert said == {"good": False, "bad": True, "retrieval": False, "oracle": False}


def test_who_is_behind_retrieval_per_frame_alone_is_told_so_there() -> None:
    def of(score: float, frame: float) -> ClipScores:
        one = scored(1, 0.5)
        values = one.values.copy()
        values[:, [PER_CLIP.index("EnergyScore"), PER_CLIP.index("EnergyScore_frame")]] = score, frame
        return replace(one, values=values)

    _, cells = table(model=TableRow({1: of(0.18, 0.197)}, 10), **{"online retrieval 10": TableRow({1: of(0.187, 0.195)})})
    assert cells["model"]["energy score ↓"] == "0.1800" and cells["model"]["per frame ↓"] == "0.1970, behind online retrieval 10"
