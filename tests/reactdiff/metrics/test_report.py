import math

import pytest
from rich.console import Console

from reactdiff.metrics.official import EXTRA, OFFICIAL, REPAIRED, Scores
from reactdiff.metrics.report import gap_closed, table


def scores(offset):
    return Scores(
        {name: offset + index for index, name in enumerate(OFFICIAL)},
        {name: offset + index + 0.5 for index, name in enumerate(REPAIRED)},
        {name: offset + index + 0.75 for index, name in enumerate(EXTRA)},
        {"FRCorr": (offset - 0.25, offset + 0.25), "FRSyn": (math.nan, math.nan)},
    )


def test_the_table_shows_official_repaired_and_further_metrics_of_every_row():
    undefined = Scores(scores(70).official | {"FRDvs": math.nan}, scores(70).repaired, dict.fromkeys(EXTRA, math.nan), {})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table({"model": scores(1), "mimic": undefined}))
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["FRCorr", "↑", "FRDist", "↓", "FRDiv", "FRVar", "FRDvs", "FRSyn", "↓"] in lines
    assert ["model", "1.000", "2.000", "3.000", "4.000", "5.000", "6.000"] in lines
    assert ["mimic", "70.00", "71.00", "72.00", "73.00", "undefined", "75.00"] in lines
    assert ["repaired", "each", "each", "Frechet", "↓", "varying"] in lines
    assert ["model", "1.500", "2.500", "10.75", "3.500"] in lines
    assert ["beside", "them", "Energy", "↓", "frame", "↓", "step", "at", "ends", "of", "mean", "no", "mouth"] in lines
    assert ["model", "1.750", "2.750", "3.750", "7.750", "8.750", "9.750"] in lines, "of steps at ends the largest"
    assert ["model", "0.75–1.25"] in lines
    assert ["mimic", "70.50", "71.50", "undefined", "72.50"] in lines


def test_the_gap_closed_works_in_either_direction():
    assert gap_closed(1.85, low=0.73, high=2.37) == pytest.approx(0.683, abs=1e-3)
    assert gap_closed(60, low=80, high=40) == 0.5


@pytest.mark.parametrize("high", [0.7, math.nan])
def test_there_must_be_a_gap(high):
    with pytest.raises(ValueError, match=r"no gap between the baseline's 0.7"):
        gap_closed(1.0, low=0.7, high=high)
