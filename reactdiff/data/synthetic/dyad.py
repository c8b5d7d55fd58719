"""Who does what when: scripts, turns, and the reactions of a listener with a manner of their own.

Behaviour is a list of events, rows of a float64 array (events, 4): onset, length (both in seconds), channel, strength.
A person's events are what the script has for them, what they do for no reason, and their reactions to the *other's* events;
every reaction begins at least `SHORTEST_DELAY` after its cause, so nothing anticipates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHANNELS = ("brow", "frown", "sneer", "stress", "tilt", "talk", "smile", "nod", "squint", "dimple", "droop", "press")
"""What a face or head can do; the first five are what listeners react to."""

TRIGGERS = CHANNELS[:5]
BACKCHANNELS = CHANNELS[6:]
INDEX = {name: number for number, name in enumerate(CHANNELS)}

COMMON = {
    "brow": {"smile": 0.95},
    "frown": {"brow": 0.8, "droop": 0.9},
    "sneer": {"squint": 0.95},
    "stress": {"nod": 0.95, "press": 0.8},
    "tilt": {"dimple": 0.95},
}
"""How every listener reacts: never in the channel they react to, so that copying the speaker is no answer."""

STYLES: dict[str, dict[str, dict[str, float]]] = {
    "warm": {"brow": {"nod": 0.8}, "sneer": {"smile": 0.8}, "tilt": {"nod": 0.8}, "stress": {"smile": 0.7}},
    "reserved": {"brow": {"nod": 0.6}, "frown": {"press": 0.7}, "sneer": {"press": 0.7}},
    "doubtful": {"brow": {"dimple": 0.9}, "stress": {"dimple": 0.8}, "sneer": {"droop": 0.8}, "tilt": {"squint": 0.8}},
    "lively": {"brow": {"squint": 0.8}, "frown": {"squint": 0.8}, "tilt": {"smile": 0.9}, "stress": {"brow": 0.8}},
}
"""What each style of listener adds: the one-to-many part, unknown to whoever sees only the speaker."""

SHORTEST_DELAY, USUAL_DELAY, LONGEST_DELAY = 0.3, 0.6, 1.5
MISSED = 0.12
"""Chance that a listener lets an event pass."""

SHORTEST_GAP, LONGEST_GAP, LAST_TRIGGER = 0.6, 1.1, 0.3
"""Seconds between two triggers of a turn, and from the last one to its end, at least."""

SHORTEST_TURN, LONGEST_TURN = 1.6, 3.2

BEFORE = 4.0
"""Seconds of conversation before a clip begins: it is cut out of a longer one, like the real clips."""

ONSET, LENGTH, CHANNEL, STRENGTH = range(4)

Chance = Callable[[int, int], np.random.Generator]
"""The generator of a person's reactions in one round."""


def _reactions() -> np.ndarray:
    table = np.zeros((len(STYLES), len(TRIGGERS), len(CHANNELS)))
    for style, extra in enumerate(STYLES.values()):
        for trigger, name in enumerate(TRIGGERS):
            for channel, strength in (COMMON[name] | extra.get(name, {})).items():
                table[style, trigger, INDEX[channel]] = strength
    return table


REACTIONS = _reactions()
"""Strength of each channel's reaction to each trigger, (styles, triggers, channels)."""


@dataclass(frozen=True)
class Manner:
    """How one listener listens during one clip: style, delay in seconds, and how strongly they show it."""

    style: int
    delay: float
    warmth: float

    @staticmethod
    def draw(rng: np.random.Generator) -> "Manner":
        """A listener's manner: any style, a delay between the shortest and the longest."""
        delay = rng.triangular(SHORTEST_DELAY, USUAL_DELAY, LONGEST_DELAY)
        return Manner(int(rng.integers(len(STYLES))), float(delay), float(rng.uniform(0.9, 1.15)))


def turns(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Who has the floor when, (turns, 3): start and end in seconds, and the person, 0 or 1, in turns; some precede the clip."""
    lengths = rng.uniform(SHORTEST_TURN, LONGEST_TURN, size=int((seconds + BEFORE) / SHORTEST_TURN) + 1)
    ends = np.cumsum(lengths) - BEFORE
    holders = (np.arange(len(lengths)) + rng.integers(2)) % 2
    table = np.column_stack([ends - lengths, ends, holders])
    return table[table[:, 0] < seconds]


def speech(floor: np.ndarray, person: int, rng: np.random.Generator) -> np.ndarray:
    """What a person does in their turns: talk throughout, and every second or so an event to react to."""
    events = [np.empty((0, 4))]
    for start, end, holder in floor:
        if holder != person:
            continue
        gaps = rng.uniform(SHORTEST_GAP, LONGEST_GAP, size=int((end - start) / SHORTEST_GAP) + 1)
        onsets = start + np.cumsum(gaps) - gaps[0] * 0.7
        onsets = onsets[onsets < end - LAST_TRIGGER]
        events.append(triggers_at(onsets, rng))
        events.append(np.array([[start + 0.1, max(end - start - 0.5, 0.3), INDEX["talk"], 0.9]]))
    return in_order(np.concatenate(events))


def triggers_at(onsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Events to react to that begin then, of any kind."""
    lengths, channels = rng.uniform(0.5, 0.9, onsets.size), rng.integers(len(TRIGGERS), size=onsets.size)
    return np.column_stack([onsets, lengths, channels, rng.uniform(0.8, 1.1, onsets.size)])


def jittered(events: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same script acted once more: a little earlier or later, longer or shorter, stronger or weaker."""
    acted = events.copy()
    acted[:, ONSET] += 0.1 * rng.standard_normal(len(acted)).clip(-2, 2)
    acted[:, [LENGTH, STRENGTH]] *= rng.uniform(0.9, 1.1, (len(acted), 2))
    return in_order(acted)


def idle(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """What a person does for no reason: about one back-channel in six seconds."""
    count = rng.poisson((seconds + BEFORE) / 6)
    channels = rng.choice([INDEX[name] for name in BACKCHANNELS], size=count)
    onsets = rng.uniform(-BEFORE, seconds, count)
    return in_order(np.column_stack([onsets, rng.uniform(0.5, 0.9, count), channels, rng.uniform(0.6, 1, count)]))


def reactions(causes: np.ndarray, manner: Manner, rng: np.random.Generator) -> np.ndarray:
    """What a listener of this manner does about the other's events; one row of randomness per cause, in order of onset.

    So the reactions to what happened before a moment do not depend on anything after it.
    """
    return in_order(answers(causes, manner, rng)[0])


def answers(causes: np.ndarray, manner: Manner, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same by cause, and beside each reaction when its cause began, (reactions,) in seconds."""
    causes = in_order(causes[causes[:, CHANNEL] < len(TRIGGERS)])
    chance = rng.random((len(causes), 4))
    strengths = REACTIONS[manner.style][causes[:, CHANNEL].astype(int)]
    strengths = strengths * (causes[:, STRENGTH] * manner.warmth)[:, None] * (chance[:, :1] >= MISSED)
    cause, channel = np.nonzero(strengths)
    delays = np.clip(manner.delay + 0.2 * (chance[:, 1] - 0.5), SHORTEST_DELAY, LONGEST_DELAY)
    onsets = causes[cause, ONSET] + delays[cause]
    lengths = causes[cause, LENGTH] * (0.9 + 0.4 * chance[cause, 2])
    events = np.column_stack([onsets, lengths, channel, strengths[cause, channel] * (0.9 + 0.2 * chance[cause, 3])])
    return events, causes[cause, ONSET]


def converse(first: np.ndarray, second: np.ndarray, manners: tuple[Manner, Manner], rng: Chance) -> tuple[np.ndarray, np.ndarray]:
    """Both persons' events, each reacting to all the other does: first to what they do of themselves, then to reactions.

    Two rounds are all there are: the one reaction in a trigger channel (brow) is answered in channels nobody reacts to.
    """
    a, b = first, second
    for round_ in range(2):
        first, second = reactions(second, manners[0], rng(0, round_)), reactions(first, manners[1], rng(1, round_))
        a, b = np.concatenate([a, first]), np.concatenate([b, second])
    return in_order(a), in_order(b)


def in_order(events: np.ndarray) -> np.ndarray:
    """The events by onset."""
    return events[np.argsort(events[:, ONSET], kind="stable")]
