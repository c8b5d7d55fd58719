"""A simulation's settings, who its clips show, and the clips themselves as arrays."""

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from reactdiff.clip import FRAME_RATE, WINDOW
from reactdiff.data.keyed import Part, generator
from reactdiff.data.paths import SPLITS, key_of
from reactdiff.data.synthetic.dyad import Manner, converse, idle, in_order, jittered, speech, turns
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
    a, b = (face_of(events[person], simulation.rows, clip_rng(simulation, split, clip, "face", person)) for person in (0, 1))
    return a, b


def behaviour(simulation: Simulation, split: str, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """Both persons' events in a clip."""
    seconds = simulation.rows / FRAME_RATE
    floor = floor_of(simulation, split, clip)

    def alone(person: int) -> np.ndarray:
        script = speech(floor, person, script_rng(simulation, split, clip, "speech", person))
        acted = jittered(script, clip_rng(simulation, split, clip, "jitter", person))
        return in_order(np.concatenate([acted, idle(seconds, clip_rng(simulation, split, clip, "idle", person))]))

    a, b = (manner_of(simulation, split, clip, person) for person in (0, 1))
    return converse(alone(0), alone(1), (a, b), lambda person, round_: clip_rng(simulation, split, clip, "reactions", person, round_))


def manner_of(simulation: Simulation, split: str, clip: int, person: int) -> Manner:
    """How a person listens in a clip."""
    return Manner.draw(clip_rng(simulation, split, clip, "manner", person))


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


def floor_of(simulation: Simulation, split: str, clip: int) -> np.ndarray:
    """Who has the floor when in a clip, as `turns` says it."""
    return turns(simulation.rows / FRAME_RATE, script_rng(simulation, split, clip, "turns"))


def clip_rng(simulation: Simulation, split: str, clip: int, *purpose: Part) -> np.random.Generator:
    """The generator of something in a clip."""
    return generator("synthetic", VERSION, simulation.seed, split, "clip", clip, *purpose)


def script_rng(simulation: Simulation, split: str, clip: int, *purpose: Part) -> np.random.Generator:
    """The generator of something that all clips of a script share."""
    return generator("synthetic", VERSION, simulation.seed, split, "script", simulation.script(clip), *purpose)
