"""A simulation's settings, who its clips show, and the clips themselves as arrays."""

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from reactdiff.clip import FRAME_RATE, WINDOW
from reactdiff.data.keyed import Part, generator
from reactdiff.data.paths import SPLITS, key_of
from reactdiff.data.synthetic.dyad import ONSET, Manner, answers, converse, idle, in_order, jittered, speech, turns
from reactdiff.data.synthetic.face import Face, face_of

VERSION = 1
"""Of what the simulator computes: changes whenever the same settings give other data."""

ROLES = ("Expert_video", "Novice_video")


@dataclass(frozen=True)
class Simulation:
    """What decides a simulated dataset. More clips in a split leave its first clips as they are.

    Attributes:
        seed: of everything random.
        frames: used frames of a clip, a multiple of 50; one more is written, as in the official data.
        clips: dyads in each split (train, val, gate, test).
        sharing: clips of a split that act the same script, each in its own way; they are appropriate for each other.
    """

    seed: int = 0
    frames: int = 250
    clips: dict[str, int] = field(default_factory=lambda: {"train": 400, "val": 60, "test": 60})
    sharing: int = 4

    def __post_init__(self) -> None:
        if self.frames <= 0 or self.frames % WINDOW:
            raise ValueError(f"simulation.frames is {self.frames}; it must be a positive multiple of {WINDOW}")
        if not self.clips or any(split not in SPLITS or count < 1 for split, count in self.clips.items()):
            raise ValueError(f"simulation.clips is {self.clips}; it must give at least one clip to one or more of {', '.join(SPLITS)}")
        if self.sharing < 1:
            raise ValueError(f"simulation.sharing is {self.sharing}; at least one clip must act a script")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have clips, in the usual order."""
        return tuple(split for split in SPLITS if split in self.clips)

    @property
    def rows(self) -> int:
        """Frames on disk: one more than are used."""
        return self.frames + 1

    def script(self, clip: int) -> int:
        """The script that a clip of a split acts; every split has scripts of its own."""
        return clip // self.sharing

    def paths(self, split: str, clip: int) -> tuple[str, str]:
        """The clip paths of its two persons. Clips of one chat show the same persons and act different scripts."""
        block, place = divmod(clip, self.sharing**2)
        turn, seat = divmod(place, self.sharing)
        chat = f"{block * self.sharing + seat:03d}_2024-01-01_{split.capitalize()}"
        first, second = (f"NoXI/{chat}/{role}/{turn + 1}" for role in ROLES)
        return first, second

    def provenance(self) -> dict[str, Any]:
        """All that is needed to make the same data again, as JSON holds it."""
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def of(provenance: dict[str, Any]) -> "Simulation":
        """The simulation that this provenance describes.

        Raises:
            ValueError: if another version of the simulator made it.
        """
        if provenance.get("version") != VERSION:
            raise ValueError(f"the data was made by version {provenance.get('version')} of the simulator; this is version {VERSION}")
        return Simulation(**{name: value for name, value in provenance.items() if name != "version"})


def dyad(simulation: Simulation, split: str, clip: int) -> tuple[Face, Face]:
    """Both persons of a clip as they are seen, `simulation.rows` frames."""
    events = behaviour(simulation, split, clip)
    a, b = (face_of(events[person], simulation.rows, _rng(simulation, split, clip, "face", person)) for person in (0, 1))
    return a, b


def behaviour(simulation: Simulation, split: str, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """Both persons' events in a clip."""
    seconds = simulation.rows / FRAME_RATE
    floor = _floor(simulation, split, clip)

    def alone(person: int) -> np.ndarray:
        script = speech(floor, person, _script_rng(simulation, split, clip, "speech", person))
        acted = jittered(script, _rng(simulation, split, clip, "jitter", person))
        return in_order(np.concatenate([acted, idle(seconds, _rng(simulation, split, clip, "idle", person))]))

    a, b = (Manner.draw(_rng(simulation, split, clip, "manner", person)) for person in (0, 1))
    return converse(alone(0), alone(1), (a, b), lambda person, round_: _rng(simulation, split, clip, "reactions", person, round_))


def redrawn(simulation: Simulation, split: str, clip: int, direction: int, draw: int, online: bool = False) -> Face:
    """Another listener for a clip's real speaker: the turns stay; manner, reactions and all they do of themselves are new.

    Online, nobody knows what the speaker did before the clip or does in the window of the reaction: such causes are drawn anew.
    """

    def rng(purpose: str) -> np.random.Generator:
        return _rng(simulation, split, clip, "oracle", direction, draw, purpose)

    speaker, listener = direction, 1 - direction
    seconds, floor = simulation.rows / FRAME_RATE, _floor(simulation, split, clip)
    own, idling = speech(floor, listener, rng("speech")), idle(seconds, rng("idle"))
    manner = Manner.draw(rng("manner"))
    answered, causes = answers(behaviour(simulation, split, clip)[speaker], manner, rng("reactions"))
    if online:
        imagined = in_order(np.concatenate([speech(floor, speaker, rng("imagined speech")), idle(seconds, rng("imagined idle"))]))
        guessed, guesses = answers(imagined, manner, rng("imagined reactions"))
        answered = np.concatenate([answered[_heard(answered, causes)], guessed[~_heard(guessed, guesses)]])
    return face_of(in_order(np.concatenate([own, idling, answered])), simulation.rows, rng("face"))


def _heard(events: np.ndarray, causes: np.ndarray) -> np.ndarray:
    """Which reactions have a cause that began in the clip, in a window before their own."""
    seconds = WINDOW / FRAME_RATE
    return (causes >= 0) & (causes // seconds < events[:, ONSET] // seconds)


@lru_cache(maxsize=4)
def _addresses(*counts: Any) -> dict[str, tuple[str, int]]:
    *clips, sharing = counts
    simulation = Simulation(clips=dict(clips), sharing=sharing)
    return {
        key_of(simulation.paths(split, clip)[0]): (split, clip) for split in simulation.splits for clip in range(simulation.clips[split])
    }


def address(simulation: Simulation, key: str) -> tuple[str, int]:
    """The split and number of the clip with this key.

    Raises:
        ValueError: if the simulation has no such clip.
    """
    book = _addresses(*simulation.clips.items(), simulation.sharing)
    if key not in book:
        raise ValueError(f"clip {key} is not of this simulation, which has {len(book)} clips like {next(iter(book))}")
    return book[key]


def _floor(simulation: Simulation, split: str, clip: int) -> np.ndarray:
    return turns(simulation.rows / FRAME_RATE, _script_rng(simulation, split, clip, "turns"))


def _rng(simulation: Simulation, split: str, clip: int, *purpose: Part) -> np.random.Generator:
    return generator("synthetic", VERSION, simulation.seed, split, "clip", clip, *purpose)


def _script_rng(simulation: Simulation, split: str, clip: int, *purpose: Part) -> np.random.Generator:
    return generator("synthetic", VERSION, simulation.seed, split, "script", simulation.script(clip), *purpose)
