from collections.abc import Callable

import numpy as np
import pytest

from cluster.bench import metrics
from cluster.bench.challenge import CHALLENGE
from cluster.bench.metrics import BY_PAIR, CASES, FullSize, full_size, pair_costs, set_cost
from cluster.bench.tables import full_size_table


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def test_every_pair_is_timed_both_ways() -> None:
    told: list[tuple[int, int]] = []
    costs = pair_costs(lambda done, total: told.append((done, total)), clips=1)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [(cost.neighbours, cost.reactions, cost.metric) for cost in costs] == [(n, kind, m) for n, kind, names in CASES for m in names]
    assert all(cost.challenge > cost.ours > 0 for cost in costs), "a hundredfold, tenfold and four hundredfold: noise cannot turn it round"


def test_a_set_is_scored_both_ways_with_the_same_values() -> None:
    cost = set_cost(no_progress, clips=2)
    assert set(cost.values) == set(cost.challenge) == set(CHALLENGE) and cost.ours > 0
    assert all(ours == pytest.approx(theirs, rel=1e-6) and theirs > 0 for ours, theirs in cost.values.values())


def test_a_rival_that_does_other_work_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHALLENGE, "FRVar", lambda *arrays: 1.00001 / 12)
    with pytest.raises(AssertionError, match=r"FRVar is 0\.0\d+ here and 0\.0833.* not the same work"):
        set_cost(no_progress, clips=2)


def test_a_full_set_is_scored_in_parts_and_its_rival_scaled_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {metric: ours for metric, (ours, _) in set_cost(no_progress, clips=2).values.items()}
    asked: list[str] = []

    def instead(metric: str) -> Callable[..., float]:
        def computed(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, near: list[np.ndarray]) -> float:
            asked.append(metric)
            assert len(pred) == 2 and [others.tolist() for others in near] == [[0, 1], [0, 1]]
            return values[metric]

        return computed

    monkeypatch.setattr(metrics, "PART", 2)
    clock = iter(range(100))
    monkeypatch.setattr(metrics, "CHALLENGE", {metric: instead(metric) for metric in CHALLENGE})
    monkeypatch.setattr(metrics.time, "process_time", lambda: float(next(clock)))
    told: list[tuple[int, int]] = []
    full = full_size(2, lambda done, total: told.append((done, total)), clips=5)
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert asked == [metric for metric in CHALLENGE if metric != "FRDvs"] and full.part == 5, "each took one second"
    pairs = (4 + 4 + 1) / 4  # of two clips and two, and of one: its group has no other in its part
    assert full.challenge == pytest.approx(sum(pairs if metric in BY_PAIR else 5 / 2 for metric in asked))
    assert full.cpu > full.making > 0 and full.memory > 0
    assert all(np.isfinite(value).all() for kind in full.scores.to_dict().values() for value in kind.values())


def test_the_table_says_what_was_scaled_and_how() -> None:
    title = str(full_size_table(FullSize(scores=None, wall=9, cpu=5, making=1, memory=10**9, part=2, challenge=40), 2).title)  # type: ignore[arg-type]
    assert "scaled from the first 20 clips, 2.0 CPU s: FRCorr and FRDist by pairs" in title and "FRDvs left out" in title
