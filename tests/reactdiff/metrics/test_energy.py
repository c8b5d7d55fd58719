"""The energy score: its definition, and that it ranks exact oracles as they deserve, which FRCorr does not."""

import math

import numpy as np
import pytest

from reactdiff.data.synthetic.oracles import Oracle, oracle_draws
from reactdiff.data.synthetic.simulation import Simulation, dyad
from reactdiff.metrics.agreement import Reaction, concordance
from reactdiff.metrics.energy import energy_scores

SIMULATION = Simulation(seed=0, frames=200, clips={"test": 12})
ITEMS = [(clip, direction) for direction in (0, 1) for clip in range(12)]


def score(pred, listeners):
    return energy_scores(Reaction.of(pred), [Reaction.of(other) for other in listeners])


def plain(pred, listeners, average):
    """The definition, for a distance that is a mean of root mean squares: over time first, or over attributes first."""
    to = np.mean([average(x, y) for x in pred for y in listeners])
    between = np.mean([average(x, y) for k, x in enumerate(pred) for m, y in enumerate(pred) if k != m])
    return to - between / 2


def test_both_scores_follow_their_definitions():
    rng = np.random.default_rng(0)
    pred, listeners = rng.random((4, 60, 25)).astype(np.float32), rng.random((3, 60, 25)).astype(np.float32)
    found = score(pred, listeners)
    exact = pred.astype(np.float64), listeners.astype(np.float64)
    assert found.attribute == pytest.approx(plain(*exact, lambda x, y: np.sqrt(((x - y) ** 2).mean(axis=0)).mean()), rel=1e-5)
    assert found.frame == pytest.approx(plain(*exact, lambda x, y: np.sqrt(((x - y) ** 2).mean(axis=1)).mean()), rel=1e-5)


def test_the_spread_of_a_single_prediction_is_unknown():
    one = np.zeros((1, 60, 25), np.float32)
    assert math.isnan(score(one, one).attribute) and math.isnan(score(one, one).frame)


def test_on_average_it_does_not_depend_on_how_many_predictions_there_are():
    rng = np.random.default_rng(1)
    listeners = rng.random((1, 60, 25)).astype(np.float32)
    few, many = (np.mean([score(rng.random((count, 60, 25)), listeners).attribute for _ in range(200)]) for count in (2, 12))
    assert few == pytest.approx(many, rel=0.01)


@pytest.fixture(scope="module")
def truth():
    """The appropriate reactions of each item."""
    faces = np.stack([[face.attributes[:200] for face in dyad(SIMULATION, "test", clip)] for clip in range(12)])
    return [faces[clip // 4 * 4 : clip // 4 * 4 + 4, 1 - direction] for clip, direction in ITEMS]


def drawn(knows):
    return [oracle_draws(SIMULATION, "test", *item, knows, 10) for item in ITEMS]


@pytest.fixture(scope="module")
def ranked(truth):
    """Energy score and FRCorr of oracles, from the best to the worst, and of those real reactions that do not suit."""
    rows = {
        "oracle": drawn(Oracle()),
        "mean of 2": drawn(Oracle(mean=2)),
        "mean of 4": drawn(Oracle(mean=4)),
        "turns": drawn(Oracle(triggers=())),
        "others": [np.concatenate([truth[(item + 4) % 24], truth[(item + 8) % 24]]) for item in range(24)],
    }
    energy = {row: np.mean([score(*pair).attribute for pair in zip(preds, truth, strict=True)]) for row, preds in rows.items()}
    agreement = {row: np.mean([best(*pair) for pair in zip(preds, truth, strict=True)]) for row, preds in rows.items()}
    return rows, energy, agreement


def best(pred, listeners):
    return concordance(Reaction.of(pred), [Reaction.of(other) for other in listeners]).mean(axis=2).max(axis=1).mean()


def test_it_ranks_draws_before_their_means_and_knowledge_before_ignorance(ranked):
    _, energy, agreement = ranked
    assert energy["oracle"] < energy["mean of 2"] < energy["mean of 4"] < energy["turns"] < energy["others"]
    assert agreement["oracle"] < agreement["mean of 2"] < agreement["mean of 4"], "FRCorr pays for averaging"


def test_a_listener_that_flickers_through_good_draws_pays_at_least_three_per_cent(ranked, truth):
    rows, energy, _ = ranked
    rng = np.random.default_rng(0)
    flickering = [np.stack([pred[rng.permutation(10), t] for t in range(200)], axis=1) for pred in rows["oracle"]]
    assert np.mean([score(pred, truth[item]).attribute for item, pred in enumerate(flickering)]) > 1.03 * energy["oracle"]
