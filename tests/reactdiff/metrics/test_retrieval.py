"""Retrieval: what it looks up, and what it must not see."""

import numpy as np
import pytest

from reactdiff.metrics.retrieval import Retrieval

KEY = ("clip", 0)


def recordings(count=6, frames=200, seed=0):
    """Speakers who wander, and listeners who say which recording and which frame this is."""
    rng = np.random.default_rng(seed)
    speakers = np.cumsum(rng.normal(size=(count, frames, 25)), axis=1).astype(np.float32)
    listeners = np.zeros((count, frames, 25), np.float32)
    listeners[..., 0], listeners[..., 1] = np.arange(count)[:, None], np.arange(frames)
    return speakers, listeners


def test_a_speaker_that_is_known_gets_the_reaction_that_followed():
    speakers, listeners = recordings()
    found = Retrieval(speakers, listeners).react(speakers[4], 2, KEY)
    np.testing.assert_array_equal(found[0], listeners[4])
    assert not np.array_equal(found[1], found[0]) and (found[1, :, 0] != 4).all(), "the second best is another recording"


def test_a_speaker_who_does_the_same_later_gets_it_from_there():
    speakers, listeners = recordings()
    late = np.concatenate([speakers[2, 20:], speakers[2, -20:]])
    found = Retrieval(speakers, listeners).react(late, 1, KEY)[0]
    assert (found[50:150, 0] == 2).all() and (found[50:150, 1] == np.arange(70, 170)).all()


@pytest.mark.parametrize("chunk", [10, 50])
def test_online_nothing_of_a_chunk_is_known_when_it_begins(chunk):
    speakers, listeners = recordings()
    retrieval, speaker = Retrieval(speakers, listeners, chunk), recordings(seed=1)[0][0]
    changed = speaker.copy()
    changed[100:] *= -1
    one, other = (retrieval.react(seen, 3, KEY) for seen in (speaker, changed))
    np.testing.assert_array_equal(one[:, : 100 + chunk], other[:, : 100 + chunk])
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:, :chunk], retrieval.react(speaker, 3, ("other", 0))[:, :chunk]), "at first it is any"


def test_more_reactions_than_recordings_repeat_them_and_none_are_refused():
    speakers, listeners = recordings(count=2)
    found = Retrieval(speakers, listeners).react(speakers[0], 3, KEY)
    np.testing.assert_array_equal(found[2], found[0])
    with pytest.raises(ValueError, match="no recordings"):
        Retrieval(speakers[:0], listeners[:0])
