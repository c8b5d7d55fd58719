import re

import numpy as np
import pytest

from reactdiff.clip import ATTRIBUTES, AU, EXPRESSION, VALENCE_AROUSAL
from reactdiff.data.keyed import generator
from reactdiff.data.synthetic.dyad import (
    BACKCHANNELS,
    CHANNEL,
    CHANNELS,
    COMMON,
    INDEX,
    LENGTH,
    LONGEST_DELAY,
    ONSET,
    REACTIONS,
    SHORTEST_DELAY,
    STYLES,
    TRIGGERS,
    Manner,
    converse,
    in_order,
    reactions,
    speech,
    turns,
)
from reactdiff.data.synthetic.face import RISE, activation, face_of
from reactdiff.data.synthetic.simulation import Simulation, behaviour, dyad
from reactdiff.metrics.agreement import Reaction, concordance
from tests.tiny import ROOT

SIMULATION = Simulation(seed=3, frames=200, clips={"train": 40, "test": 8})


@pytest.fixture(scope="module")
def attributes():
    """All attributes of 40 clips, (persons, frames, 25)."""
    return np.stack([face.attributes for clip in range(40) for face in dyad(SIMULATION, "train", clip)])


def test_nobody_reacts_in_the_channel_they_react_to():
    for style, trigger in np.ndindex(len(STYLES), len(TRIGGERS)):
        assert REACTIONS[style, trigger, trigger] == 0
        assert REACTIONS[style, trigger].any()


def test_a_reaction_that_is_itself_reacted_to_is_answered_in_channels_nobody_reacts_to():
    for channel in set(TRIGGERS) & {channel for table in (COMMON, *STYLES.values()) for row in table.values() for channel in row}:
        answers = REACTIONS[:, TRIGGERS.index(channel), :]
        assert not answers[:, : len(TRIGGERS)].any()


def test_the_four_styles_differ():
    assert len(np.unique(REACTIONS.reshape(len(STYLES), -1), axis=0)) == 4


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_no_reaction_comes_before_the_shortest_delay_and_none_after_the_longest(style):
    causes = np.array([[3.0 * n, 0.6, INDEX["brow"], 1.0] for n in range(200)])
    for draw in range(20):
        rng = generator("manner", style, draw)
        delay = Manner.draw(rng).delay
        answers = reactions(causes, Manner(style, delay, 1.0), rng)
        delays = answers[:, ONSET] % 3.0
        assert SHORTEST_DELAY - 1e-9 <= delays.min() and delays.max() <= LONGEST_DELAY + 1e-9


def test_an_eighth_of_the_events_is_let_pass():
    causes = np.array([[3.0 * n, 0.6, INDEX["sneer"], 1.0] for n in range(4000)])
    answers = reactions(causes, Manner(0, 0.6, 1.0), generator("misses"))
    assert 0.86 < len(np.unique(answers[:, ONSET] // 3.0)) / 4000 < 0.90


def test_the_floor_changes_hands_and_only_its_holder_talks():
    floor = turns(20.0, generator("floor"))
    assert (np.diff(floor[:, 2]) != 0).all() and floor[0, 0] < 0 and floor[-1, 1] >= 20
    for person in (0, 1):
        talk = speech(floor, person, generator("talk", person))
        mine = floor[floor[:, 2] == person]
        inside = (talk[:, ONSET, None] >= mine[:, 0]) & (talk[:, ONSET, None] < mine[:, 1])
        assert len(talk) and inside.any(axis=1).all()


@pytest.mark.parametrize("moment", [1.0, 3.3, 6.0])
@pytest.mark.parametrize("clip", range(6))
def test_changing_the_speakers_future_changes_nothing_earlier_in_the_listener(clip, moment):
    speaker = behaviour(SIMULATION, "train", clip)[0]
    future = np.array([[moment + 0.1 * n, 0.7, n % len(TRIGGERS), 1.0] for n in range(30)])
    changed = in_order(np.concatenate([speaker[speaker[:, ONSET] < moment], future]))
    manner = Manner.draw(generator("manner", clip))
    before, after = (face_of(reactions(events, manner, generator("r", clip)), 201, generator("f", clip)) for events in (speaker, changed))
    until = int((moment + SHORTEST_DELAY) * 25)
    np.testing.assert_array_equal(before.attributes[:until], after.attributes[:until])
    assert not np.array_equal(before.attributes, after.attributes)


def test_in_a_dyad_a_change_in_one_persons_future_reaches_neither_persons_past():
    moment, manners = 4.0, (Manner(3, 0.5, 1.0), Manner(3, 0.7, 1.0))
    own = [speech(turns(8.0, generator("t")), person, generator("s", person)) for person in (0, 1)]
    changed = in_order(np.concatenate([own[0][own[0][:, ONSET] < moment], [[moment + 0.3 * n, 0.5, n % 5, 1.0] for n in range(9)]]))

    def chance(person, round_):
        return generator("chance", person, round_)

    before, after = converse(own[0], own[1], manners, chance), converse(changed, own[1], manners, chance)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[one[:, ONSET] < moment], other[other[:, ONSET] < moment])
    assert len(before[1]) != len(after[1]) or not np.array_equal(before[1], after[1])


def test_both_persons_react_to_each_other():
    for clip in range(10):
        both = behaviour(SIMULATION, "train", clip)
        for mine, others in (both, both[::-1]):
            silent = [row for row in mine if CHANNELS[int(row[CHANNEL])] in BACKCHANNELS]
            causes = others[others[:, CHANNEL] < len(TRIGGERS), ONSET]
            answered = [row for row in silent if ((row[ONSET] - causes >= SHORTEST_DELAY) & (row[ONSET] - causes <= LONGEST_DELAY)).any()]
            assert len(answered) > len(silent) / 2


def test_an_event_comes_stays_and_goes_smoothly():
    rows = activation(np.array([[2.0, 1.0, INDEX["nod"], 0.9]]), 200)[:, INDEX["nod"]]
    assert (rows[:51] == 0).all() and (rows[100:] == 0).all()
    assert rows[int((2.0 + RISE) * 25) + 1 : int((3.0 + RISE) * 25)] == pytest.approx(0.9)
    assert np.abs(np.diff(rows)).max() < 0.25


def test_the_attributes_have_the_kinds_and_ranges_of_the_real_ones(attributes):
    assert attributes.shape == (80, 201, 25) and attributes.dtype == np.float32
    assert set(np.unique(attributes[..., AU])) == {0.0, 1.0}
    assert np.abs(attributes[..., VALENCE_AROUSAL]).max() < 1
    assert attributes[..., EXPRESSION].min() > 0
    assert attributes[..., EXPRESSION].sum(axis=-1) == pytest.approx(1, abs=1e-5)


def test_action_units_are_rare_and_affect_drifts_smoothly(attributes):
    rates = attributes[..., AU].mean(axis=(0, 1))
    assert (rates > 0.04).all() and (rates < 0.5).all() and np.median(rates) < 0.25
    assert np.abs(np.diff(attributes[..., VALENCE_AROUSAL], axis=1)).max() < 0.25
    assert attributes[..., VALENCE_AROUSAL].std(axis=1).mean() > 0.15


def test_at_most_a_third_of_the_attributes_is_constant_in_a_clip(attributes):
    assert (attributes.std(axis=1) == 0).mean() < 1 / 3
    assert (attributes.std(axis=(0, 1)) > 0).all(), ATTRIBUTES


def test_lengths_and_onsets_of_a_clip_cover_it_from_before_its_beginning_to_its_end():
    events = np.concatenate(behaviour(SIMULATION, "train", 0))
    assert events[:, ONSET].min() < 0 and (events[:, ONSET] + events[:, LENGTH]).max() > 7


def test_a_perfect_copy_scores_what_the_pages_say() -> None:
    def copied(frames: int) -> float:
        """FRCorr per prediction of exact copies of the demo's test clips: what is constant in a clip scores 0."""
        demo = Simulation(frames=frames, clips={"test": 30})
        faces = [Reaction.of(face.attributes[None, :frames]) for clip in range(30) for face in dyad(demo, "test", clip)]
        one = [Reaction(face.series[0], face.mean[0], face.variance[0]) for face in faces]
        return float(np.mean([concordance(face, [same]).mean() for face, same in zip(faces, one, strict=True)]))

    said = re.search(r"near (0\.\d\d) per prediction on simulated clips of 8 s, (0\.\d\d) of 10 s", (ROOT / "docs/metrics.md").read_text())
    assert said and [f"{copied(frames):.2f}" for frames in (200, 250)] == list(said.groups())
    assert f"a perfect copy of a clip scores {said[1]} per prediction" in (ROOT / "docs/data.md").read_text()
