"""Differences of rows, clip by clip: narrower than what the rows themselves vary by, and about 0 where there is none."""

import re

import numpy as np
import pytest

from cluster.evaluation.rows import CUT
from cluster.studies.comparison_pairs import independent_groups, pairs_markdown, row_difference
from cluster.studies.comparison_table import TableRow, beside
from cluster.studies.kept_scores import ClipScores
from reactdiff.data.keyed import generator
from reactdiff.metrics.partial import PER_CLIP

CLIPS = 40
ALONE = np.arange(CLIPS)
"""Every clip is a group of its own."""


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
    mean, low, high, seeds_agree = row_difference(better, worse, "FRCorr", ALONE)
    assert 0 < low < mean < high and mean - low < 0.1 and abs(mean - 0.2) < 0.05 and seeds_agree
    assert row_difference(worse, better, "FRCorr", ALONE)[:3] == pytest.approx([-mean, -high, -low])
    intervals = [one.mean_of_seeds().intervals()["FRCorr"] for one in (worse, better)]
    assert intervals[0][1] > intervals[1][0], "the rows' own intervals overlap"
    same = row_difference(row(0.0, "another"), worse, "FRCorr", ALONE)
    assert same.low < 0 < same.high


def test_items_that_share_a_reference_or_a_recording_are_drawn_together() -> None:
    appropriate = np.eye(8, dtype=bool)
    appropriate[0, 1] = appropriate[6, 7] = True  # clips 0 and 1 share an act in one direction, 2 and 3 in the other
    assert independent_groups(appropriate).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_clips_that_say_the_same_make_no_interval_narrower() -> None:
    better, worse = row(0.2, "better"), row(0.0, "worse")
    often = []
    for one in (better, worse):
        often.append(TableRow({seed: ClipScores(np.repeat(scores.values, 4, axis=0), 2) for seed, scores in one.seeds.items()}, 0))
    alone = row_difference(better, worse, "FRCorr", ALONE)
    assert row_difference(*often, "FRCorr", np.repeat(ALONE, 4))[:3] == pytest.approx(alone[:3])
    as_if = row_difference(*often, "FRCorr", np.arange(4 * CLIPS))
    assert as_if.high - as_if.low < 0.8 * (alone.high - alone.low)


def test_what_one_seed_contradicts_is_not_bold() -> None:
    base, mixed = row(0.0, "base"), row(0.5, "mixed")
    mixed.seeds[2] = row(-0.2, "mixed").seeds[2]
    assert not row_difference(mixed, base, "FRCorr", ALONE).seeds_agree
    assert "**" not in pairs_markdown({"mixed": mixed, "base": base}, ["base"], ALONE)


def test_only_seeds_that_both_have_are_compared() -> None:
    assert row_difference(row(0.2, "better", (0, 1)), row(0.0, "worse", (1, 2)), "FRCorr", ALONE) == (
        row_difference(row(0.2, "better", (1,)), row(0.0, "worse", (1,)), "FRCorr", ALONE)
    )


def test_draws_with_units_cut_are_compared_with_draws_with_units_cut() -> None:
    rows = {"better": row(0.2, "better"), "base": row(0.0, "worse")}
    cut = {beside(CUT, "better"): row(0.3, "cut"), beside(CUT, "base"): row(0.4, "cut base")}
    lines = dict(line.removeprefix("| ").split(" | ", 1) for line in pairs_markdown(rows | cut, ["base"], ALONE).splitlines()[2:])
    assert list(lines) == ["better", "base", *cut]
    assert lines["better"].startswith("**+0.") and lines[beside(CUT, "better")].startswith("**-0."), "each from its own kind"
    assert lines[beside(CUT, "base")].strip(" |") == lines["base"].strip(" |") == "", "with itself nothing is compared"


def test_the_table_has_models_alone_and_marks_what_excludes_0() -> None:
    rows = {"better": row(0.2, "better"), "same": row(0.0, "another"), "base": row(0.0, "worse"), "oracle": TableRow(row(1.0, "o").seeds)}
    head, _, *lines = pairs_markdown(rows, ["base"], ALONE).splitlines()
    assert "FRCorr ↑ against base" in head and [line.split(" | ")[0] for line in lines] == ["| better", "| same", "| base"]
    assert re.search(r"\*\*\+0\.\d{3} \(\+0\.\d{3} \.\. \+0\.\d{3}\)\*\*", lines[0]) and "**" not in lines[1]
