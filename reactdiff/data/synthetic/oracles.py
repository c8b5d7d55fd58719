"""Oracles: who knows how the simulator's listeners react, and so much of the clip. They say what a score is worth.

Each draws another listener for a clip's real speaker: manner, reactions and all that listeners do of themselves are new, but for what
it is told; what it does not know of the speaker it imagines. No oracle is the best there is: the speaker reacts, too, and who sees all
of it can infer what the listener did. Who is told that beforehand shows how much it may be worth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from reactdiff.clip import ATTRIBUTES, FRAME_RATE
from reactdiff.data.keyed import Part
from reactdiff.data.synthetic.dyad import (
    CHANNEL,
    CHANNELS,
    LAST_TRIGGER,
    LONGEST_GAP,
    LONGEST_TURN,
    ONSET,
    SHORTEST_GAP,
    SHORTEST_TURN,
    TRIGGERS,
    Manner,
    answers,
    idle,
    in_order,
    jittered,
    speech,
    triggers_at,
    turns,
)
from reactdiff.data.synthetic.face import activation, face_from
from reactdiff.data.synthetic.simulation import Simulation, address, behaviour, clip_rng, floor_of, manner_of, script_rng

ALL = 100
"""Draws whose mean stands for the mean of all there are."""

MEANS = (2, 4, 10, ALL)
"""Draws that are averaged into one prediction along an oracle's frontier, beside single ones."""

CHUNKS = (50, 25, 10)
"""Frames that online oracles draw at once."""


@dataclass(frozen=True)
class Oracle:
    """What an oracle knows of a clip.

    Attributes:
        triggers: of the speaker's, those it notices.
        chunk: frames that it draws at once, knowing of the speaker only what came before; 0: the whole clip, knowing all of it.
        told_turns: it knows whose turn it will be in a chunk and later; whoever knows the whole clip knows that.
        told_style: it is told the real listener's style.
        told_script: it is told what the listener's script says, if not how it was acted.
        mean: draws that are averaged into one prediction; with `ALL` all predictions are the same.
    """

    triggers: tuple[str, ...] = TRIGGERS
    chunk: int = 0
    told_turns: bool = False
    told_style: bool = False
    told_script: bool = False
    mean: int = 1

    def __post_init__(self) -> None:
        if self.chunk and (self.triggers != TRIGGERS or self.told_script):
            raise ValueError(f"{self}: an oracle that hears chunks notices every trigger and is told no script")


def oracle_name(chunk: int = 0, mean: int = 1) -> str:
    """The name of the oracle beside models that react in chunks of so many frames (0: to whole clips)."""
    return (f"online oracle {chunk}" if chunk else "oracle") + (f" mean of {mean}" if mean > 1 else "")


def frontier_names(chunk: int = 0) -> list[str]:
    """The oracles along the frontier of FRCorr against FRDiv that models of this chunk have, single draws first."""
    return [oracle_name(chunk, mean) for mean in (1, *MEANS)]


def ladder(chunk: int = 0) -> dict[str, Oracle]:
    """The oracles beside models that react in chunks of so many frames (0: to whole clips), by name, from those who know the least."""
    chunks = sorted({*CHUNKS, chunk} - {0}, reverse=True)
    rungs = {
        "oracle of turns": Oracle(triggers=()),
        "oracle of what is heard": Oracle(triggers=("stress",)),
        **{oracle_name(frames): Oracle(chunk=frames) for frames in chunks},
        **({f"{oracle_name(chunk)} told the turns": Oracle(chunk=chunk, told_turns=True)} if chunk else {}),
        oracle_name(): Oracle(),
        "oracle told the style": Oracle(told_style=True),
        "oracle told the script": Oracle(told_script=True),
    }
    return rungs | {oracle_name(chunk, mean): Oracle(chunk=chunk, mean=mean) for mean in MEANS}


def oracle(provenance: dict[str, Any], key: str, direction: int, count: int, knows: Oracle | None = None) -> np.ndarray:
    """Reactions of an oracle to a simulated clip's speaker; without `knows` it hears the whole clip.

    Args:
        provenance: of the dataset, as `Tree.provenance` gives it.
        key: of the clip.
        direction: 0 if person a speaks and b listens, else 1.
        count: how many reactions.
        knows: which oracle.

    Returns:
        attributes (count, frames, 25), float32, with the used frames only; reaction k is the same for any count.

    Raises:
        ValueError: if the data was not simulated by this version, has no such clip, or its clips do not divide into the oracle's chunks.
    """
    if "simulator" not in provenance:
        raise ValueError(f"only simulated data has an oracle; this data is from {provenance.get('source', 'elsewhere')}")
    if direction not in (0, 1):
        raise ValueError(f"direction is {direction}; 0: a speaks and b listens, 1: the reverse")
    simulation = Simulation.of(provenance["simulator"])
    return oracle_draws(simulation, *address(simulation, key), direction, knows or Oracle(), count)


def oracle_draws(simulation: Simulation, split: str, clip: int, direction: int, knows: Oracle, count: int) -> np.ndarray:
    """The same by the clip's number in its split."""
    if knows.chunk and simulation.frames % knows.chunk:
        raise ValueError(f"an oracle's chunks of {knows.chunk} frames do not divide clips of {simulation.frames}: choose a divisor")
    scene = _Scene(simulation, split, clip, direction)
    draw = scene.unprepared if knows.chunk and not knows.told_turns else scene.prepared

    def mean_of(first: int) -> np.ndarray:
        return np.stack([draw(knows, first + number) for number in range(knows.mean)]).mean(axis=0, dtype=np.float64)

    if knows.mean == ALL:
        means = [mean_of(0)] * count
    else:
        means = [mean_of(knows.mean * k) for k in range(count)]
    return np.array(means, dtype=np.float32).reshape(count, simulation.rows, len(ATTRIBUTES))[:, : simulation.frames]


class _Scene:
    """One direction of a clip, and who may listen in it."""

    def __init__(self, simulation: Simulation, split: str, clip: int, direction: int):
        self.rows, self.seconds = simulation.rows, simulation.rows / FRAME_RATE
        self.floor = floor_of(simulation, split, clip)
        self.person = {"speaker": direction, "listener": 1 - direction}
        events = behaviour(simulation, split, clip)[direction]
        self.triggers = events[events[:, CHANNEL] < len(TRIGGERS)]
        self.style = manner_of(simulation, split, clip, 1 - direction).style
        self.script = speech(self.floor, 1 - direction, script_rng(simulation, split, clip, "speech", 1 - direction))
        self._of_clip = (simulation, split, clip, "oracle", direction)

    def _rng(self, draw: int) -> Callable[..., np.random.Generator]:
        def rng(*purpose: Part) -> np.random.Generator:
            return clip_rng(*self._of_clip, draw, *purpose)

        return rng

    def _manner(self, knows: Oracle, rng: Callable[..., np.random.Generator]) -> Manner:
        manner = Manner.draw(rng("manner"))
        return replace(manner, style=self.style) if knows.told_style else manner

    def prepared(self, knows: Oracle, draw: int) -> np.ndarray:
        """A listener who knows whose turn it is throughout, (rows, 25)."""
        rng = self._rng(draw)
        manner, idling = self._manner(knows, rng), idle(self.seconds, rng("idle"))
        own = jittered(self.script, rng("jitter")) if knows.told_script else speech(self.floor, self.person["listener"], rng("speech"))
        imagined = speech(self.floor, self.person["speaker"], rng("imagined speech"))
        noticed, unnoticed = (_of_channels(self.triggers, knows.triggers), _of_channels(imagined, set(TRIGGERS) - set(knows.triggers)))
        answered, causes = answers(noticed, manner, rng("reactions"))
        if knows.chunk:  # causes before the clip or in the reaction's own chunk are not known
            unnoticed = imagined
            answered = answered[_before_chunk(answered, causes, knows.chunk)]
        guessed, guesses = answers(unnoticed, manner, rng("imagined reactions"))
        if knows.chunk:
            guessed = guessed[~_before_chunk(guessed, guesses, knows.chunk)]
        events = in_order(np.concatenate([own, idling, answered, guessed]))
        return face_from(activation(events, self.rows), rng("face")).attributes

    def unprepared(self, knows: Oracle, draw: int) -> np.ndarray:
        """A listener who does not know whose turn it will be, nor anything else of a chunk when it begins, (rows, 25).

        The floor and the speaker are imagined anew for every chunk, with what is known of the running turn; turns that came to pass, and
        what the listener did in them, stay. A reaction that has begun goes on whatever becomes of its cause.
        """
        rng = self._rng(draw)
        manner, idling = self._manner(knows, rng), idle(self.seconds, rng("idle"))

        @cache
        def acted(who: str, number: int, start: float, end: float, holder: float) -> np.ndarray:
            return speech(np.array([[start, end, holder]]), self.person[who], rng(who, number))

        def acts(who: str, floor: np.ndarray) -> np.ndarray:
            return np.concatenate([acted(who, number, *turn) for number, turn in enumerate(floor.tolist())])

        begun, activations = np.empty((0, 4)), []
        for number, first in enumerate(range(0, self.rows, knows.chunk)):
            frames = min(knows.chunk, self.rows - first)
            start, end = first / FRAME_RATE, (first + frames) / FRAME_RATE
            floor = self._believed(start, end, rng("turns", number))
            imagined, heard = acts("speaker", floor), self.triggers[(self.triggers[:, ONSET] >= 0) & (self.triggers[:, ONSET] < start)]
            imagined = imagined[(imagined[:, ONSET] < 0) | (imagined[:, ONSET] >= start)]
            running = floor[(floor[:, 0] < start) & (floor[:, 1] > start)]
            if number and running[0, 2] == self.person["speaker"] and (heard[:, ONSET] >= running[0, 0]).any():
                goes_on = _continued(heard[-1, ONSET], start, running[0, 1], rng("goes on", number))
                imagined = np.concatenate([imagined[(imagined[:, ONSET] < 0) | (imagined[:, ONSET] >= running[0, 1])], goes_on])
            # One row of chance a cause, in order: what was heard keeps its rows while what comes later is imagined anew.
            answered, _ = answers(np.concatenate([heard, imagined]), manner, rng("reactions" if number else "first reactions"))
            now = answered[(answered[:, ONSET] < end) & ((answered[:, ONSET] >= start) if number else True)]
            begun = np.concatenate([begun, now])
            events = np.concatenate([acts("listener", floor), idling, begun])
            activations.append(activation(events, frames, first))
        return face_from(np.concatenate(activations), rng("face")).attributes

    def _believed(self, start: float, end: float, rng: np.random.Generator) -> np.ndarray:
        """Turns up to a chunk's end as they appear at its start: those that began are known, the running one has lasted so long."""
        if start == 0:
            return turns(self.seconds, rng)
        floor = self.floor[self.floor[:, 0] < start].tolist()
        began, _, holder = floor[-1]
        floor[-1][1] = began + rng.uniform(max(SHORTEST_TURN, start - began), LONGEST_TURN)
        while floor[-1][1] < end:
            holder = 1 - holder
            floor.append([floor[-1][1], floor[-1][1] + rng.uniform(SHORTEST_TURN, LONGEST_TURN), holder])
        return np.array(floor)


def _continued(last: float, now: float, end: float, rng: np.random.Generator) -> np.ndarray:
    """The triggers that are still to come in a turn, given when the last one was, and that none came since."""
    gaps = rng.uniform(SHORTEST_GAP, LONGEST_GAP, size=int((end - last) / SHORTEST_GAP) + 2)
    gaps[0] = rng.uniform(max(SHORTEST_GAP, now - last), max(LONGEST_GAP, now - last))
    onsets = last + np.cumsum(gaps)
    return triggers_at(onsets[onsets < end - LAST_TRIGGER], rng)


def _of_channels(events: np.ndarray, names: tuple[str, ...] | set[str]) -> np.ndarray:
    return events[np.isin(events[:, CHANNEL], [CHANNELS.index(name) for name in names])]


def _before_chunk(events: np.ndarray, causes: np.ndarray, chunk: int) -> np.ndarray:
    """Which reactions have a cause that began in the clip, in a chunk before their own."""
    seconds = chunk / FRAME_RATE
    return (causes >= 0) & (causes // seconds < events[:, ONSET] // seconds)
