"""Differences of rows, clip by clip: narrower than what the rows themselves vary by, and about 0 where there is none."""

import re

import numpy as np
import pytest

from cluster.studies.comparison_pairs import pairs_markdown, row_difference
from cluster.studies.comparison_table import TableRow
from cluster.studies.kept_scores import ClipScores
from reactdiff.data.keyed import generator
from reactdiff.metrics.partial import PER_CLIP

CLIPS = 40


def row(better: float, name: str, seeds: tuple[int, ...] = (0, 1, 2)) -> TableRow:
    """A model whose FRCorr is so much better on each clip, of which some are much harder than others."""
    hard = generator("clips").normal(size=CLIPS)
    scores = {}
    for seed in seeds:
        values = np.ones((CLIPS, len(PER_CLIP)))
        values[:, PER_CLIP.index("FRCorr")] = hard + better + 0.1 * generator(name, seed).normal(size=CLIPS)
        scores[seed] = ClipScores(values, 2)
    return TableRow(scores, 0)


def test_what_is_hard_for_both_cancels_out() -> None:
    better, worse = row(0.2, "better"), row(0.0, "worse")
    mean, low, high = row_difference(better, worse, "FRCorr")
    assert 0 < low < mean < high and mean - low < 0.1 and abs(mean - 0.2) < 0.05
    assert row_difference(worse, better, "FRCorr") == pytest.approx([-mean, -high, -low])
    intervals = [one.mean_of_seeds().intervals()["FRCorr"] for one in (worse, better)]
    assert intervals[0][1] > intervals[1][0], "the rows' own intervals overlap"
    mean, low, high = row_difference(row(0.0, "another"), worse, "FRCorr")
    assert low < 0 < high


def test_only_seeds_that_both_have_are_compared() -> None:
    assert row_difference(row(0.2, "better", (0, 1)), row(0.0, "worse", (1, 2)), "FRCorr") == (
        row_difference(row(0.2, "better", (1,)), row(0.0, "worse", (1,)), "FRCorr")
    )


def test_the_table_has_models_alone_and_marks_what_excludes_0() -> None:
    rows = {"better": row(0.2, "better"), "same": row(0.0, "another"), "base": row(0.0, "worse"), "oracle": TableRow(row(1.0, "o").seeds)}
    head, _, *lines = pairs_markdown(rows, ["base"]).splitlines()
    assert "FRCorr ↑ against base" in head and [line.split(" | ")[0] for line in lines] == ["| better", "| same", "| base"]
    assert re.search(r"\*\*\+0\.\d{3} \(\+0\.\d{3} \.\. \+0\.\d{3}\)\*\*", lines[0]) and "**" not in lines[1]
