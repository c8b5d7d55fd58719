import numpy as np
import pytest

from cluster.bench.metrics import CLIPS_TIMED, OFFICIAL_SECONDS, full_size, pair_costs


def test_every_metric_is_timed_beside_the_challenges_code():
    told = []
    costs = pair_costs(lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)] and CLIPS_TIMED > 2
    assert {cost.metric for cost in costs} == set(OFFICIAL_SECONDS)
    assert {(cost.neighbours, cost.reactions) for cost in costs if cost.metric == "FRDist"} == {
        (1, "independent"),
        (5, "independent"),
        (5, "alike"),
    }
    for cost in costs:
        assert cost.seconds > 0


def test_a_full_set_is_scored_in_parts_and_its_pairs_are_counted():
    told = []
    full = full_size(2, lambda done, total: told.append((done, total)), clips=22)
    assert told == [(20, 22), (22, 22)]
    pairs = 10 * (4 * 5 * 5 + 2 * 2)  # four groups of five clips and one of two
    assert full.official == pytest.approx(pairs * (2.6e-3 + 10.1e-3) + 220 * 87e-3)
    assert full.cpu > full.making > 0 and full.memory > 0
    assert all(np.isfinite(value).all() for values in full.scores.to_dict().values() for value in values.values())
    assert full.scores.official["FRDiv"] == pytest.approx(full.scores.official["FRDvs"], rel=0.05)  # all are independent
