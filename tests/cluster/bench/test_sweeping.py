"""What halving would name on other clips, from errors and scores that are made here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.bench import sweeping
from cluster.bench.sweeping import SECONDS, Named, best_scored, difference, names
from cluster.studies.halving import Halving
from cluster.studies.kept_scores import ClipScores
from cluster.studies.searchers import Mode
from reactdiff.data.keyed import generator
from reactdiff.metrics.partial import PER_CLIP
from tests.cluster.support.sweeps import search_in

CLIPS, TRIALS = 16, 4
HALVING = Halving(rungs=(10, 20), error=0.3, clips=CLIPS)


def scores(level: float, trial: int) -> ClipScores:
    """As if each clip's every value were about this one."""
    values = level + 0.01 * generator("scores", trial).standard_normal((2 * CLIPS, len(PER_CLIP)))
    return ClipScores(values, predictions=3)


def errors(*levels: float) -> dict[int, dict[int, np.ndarray]]:
    """Trial -> rung -> error of each clip; what clips share is much more than what trials differ by."""
    hard = generator("hard").uniform(1, 9, CLIPS)
    return {
        trial: {rung: hard + level + 0.01 * generator("noise", trial, rung).standard_normal(CLIPS) for rung in (0, 1)}
        for trial, level in enumerate(levels)
    }


@pytest.fixture
def metric() -> str:
    return next(name for name in scores(1.0, 0).metrics() if not np.isnan(scores(1.0, 0).metrics()[name]))


def test_the_best_scored_those_that_are_left_is_named_on_every_resample(metric: str) -> None:
    ends = {trial: scores(level, trial) for trial, level in enumerate((2.0, 5.0, 9.0, 3.0))}
    mode: Mode = "max" if best_scored(ends, range(TRIALS), metric, "max") == 2 else "min"
    assert names(HALVING, errors(1.0, 0.5, 0.1, 0.9), ends, metric, mode, 10) == [2] * 10
    stopped = names(HALVING, errors(0.1, 0.5, 0.9, 0.4), ends, metric, mode, 10)
    assert stopped == [0] * 10, "the others were behind at the first rung, by less than clips differ"
    assert names(HALVING, errors(0.1, 0.5, 0.9, 0.4), ends, metric, mode, 10) == stopped


def test_a_clip_that_is_drawn_several_times_is_one_sample(metric: str) -> None:
    """Of eight clips a trial that is worse on each is stopped at this level by six and more: only some draws have so many."""
    ends, rule = {0: scores(2.0, 0), 1: scores(9.0, 1)}, Halving(rungs=(10,), error=0.02, clips=8)
    mode: Mode = "max" if best_scored(ends, range(2), metric, "max") == 1 else "min"
    clips = generator("eight").uniform(1, 9, 8)
    assert set(names(rule, {0: {0: clips}, 1: {0: clips + 1}}, ends, metric, mode, 40)) == {0, 1}


def test_a_command_that_is_interrupted_has_taken_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = search_in(tmp_path).opened
    opened.store.put(SECONDS, b'{"seconds": 5.0, "over": false}')
    clock = iter([100.0, 107.0])
    monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run_sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweeping._swept(opened.sweep, opened.overrides, print, lambda *_: None)
    assert json.loads(opened.store.read(SECONDS)) == {"seconds": 12.0, "over": False}


def test_a_difference_is_paired_by_clip_and_holds_0_where_nobody_can_tell(metric: str) -> None:
    one = scores(5.0, 0)
    assert difference(one, one, metric) == (0.0, 0.0)
    shifted = ClipScores(one.values + 0.001, one.predictions)
    assert not Named(1, difference(shifted, one, metric)).as_good, "less than the clips' own scatter, but on every clip"
    noise = 0.1 * generator("other").standard_normal(one.values.shape)
    assert Named(1, difference(ClipScores(one.values + noise - noise.mean(0), one.predictions), one, metric)).as_good
