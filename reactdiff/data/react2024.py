"""The official REACT 2024 tree on disk (NoXI, RECOLA, UDIVA), read as clips; docs/data.md describes the layout.

Streams are what the data has: `features/` where somebody extracted them, else what the challenge itself ships.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from reactdiff.clip import AU, EXPRESSION, TARGETS, VALENCE_AROUSAL, WINDOW
from reactdiff.data.appropriateness import appropriateness
from reactdiff.data.files import ClipError, read_csv, read_npy, read_tensors, read_wav
from reactdiff.data.mfcc import MFCC_WIDTH
from reactdiff.data.paths import SPLITS, Pair, emotion_of, read_pairs, refuse_collisions, subject_of
from reactdiff.data.sample import Clip, StreamSpec

SOUND_SLACK = 2
"""Rows by which a stream made from sound may differ from the clip: wav2vec gives about 750 rows for 751 frames."""

EXTRACTED = {"Video_features": ("va", "au", "fer"), "Audio_features": ("mfcc", "w2v")}
"""Each folder of `features/`, and the order of the streams in a file's list of tensors."""

NATURAL = {"au": AU, "va": VALENCE_AROUSAL, "fer": EXPRESSION}
"""The facial streams that the attributes themselves are, where no features were extracted."""

FLOAT16_MAX, FLOAT32_MAX = (float(np.finfo(kind).max) for kind in (np.float16, np.float32))

Rows = dict[str, np.ndarray]
T = TypeVar("T")


class Tree:
    """A folder in the official layout.

    Raises:
        ValueError: if no split's CSV is there, or a CSV names a clip that cannot be told from another.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.splits = tuple(split for split in SPLITS if (self.root / f"{split}.csv").is_file())
        if not self.splits:
            names = ", ".join(f"{split}.csv" for split in SPLITS)
            raise ValueError(f"{self.root} is no REACT 2024 tree: it has none of {names}; point at the folder that holds them")
        self._pairs = {split: list(read_pairs(self.root / f"{split}.csv", split)) for split in self.splits}
        refuse_collisions([pair for split in self.splits for pair in self._pairs[split]])
        self._extracted = tuple(name for name in EXTRACTED if any((self.root / "features" / s / name).is_dir() for s in self.splits))

    def pairs(self, split: str) -> list[Pair]:
        """The pairs of a split, in file order."""
        if split not in self._pairs:
            raise ValueError(f"{self.root} has no split {split!r}; it has {', '.join(self.splits)}")
        return self._pairs[split]

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The input streams that every person of this tree has; widths are the data's."""
        return self._shape[1]

    @property
    def frames(self) -> int:
        """Frames of every clip: the largest multiple of 50 in the rows on disk (751 rows: 750 frames)."""
        return self._shape[0] // WINDOW * WINDOW

    def read(self, pair: Pair) -> Clip:
        """One clip, both persons: float16 inputs and float32 targets, (frames, width) each.

        Raises:
            ClipError: naming clip, file and rule, if any part is missing, unreadable, misshapen, not finite, or too large
                for float16.
        """
        paths = {"a": pair.speaker_path, "b": pair.listener_path}
        people = {person: self._person(pair, path) for person, path in paths.items()}
        subjects = {person: subject_of(path) for person, path in paths.items()}
        return Clip(pair.key, people, {"split": pair.split, "row": pair.row, "paths": paths, "subjects": subjects})

    def appropriateness(self, split: str) -> np.ndarray | None:
        """The (2n, 2n) bool matrix of a split's n pairs, plain then mirrored; None where the tree has no matrix for it.

        Raises:
            ValueError: as `reactdiff.data.appropriateness.appropriateness` does.
        """
        return appropriateness(self.root, split, [pair.speaker_path for pair in self.pairs(split)])

    def provenance(self) -> dict[str, Any]:
        """Where this data comes from, for the dataset's manifest; of a simulated tree also how it was made."""
        made = self.root / "simulator.json"
        origin = {"source": "react2024", "pairs": {split: len(self._pairs[split]) for split in self.splits}}
        return origin | ({"simulator": json.loads(made.read_text())} if made.is_file() else {})

    @cached_property
    def _shape(self) -> tuple[int, tuple[StreamSpec, ...]]:
        """Rows on disk and streams, from the first person whose files are readable: one bad clip must not hide the rest."""
        first: ValueError | None = None
        for pair in (pair for split in self.splits for pair in self._pairs[split]):
            for path in (pair.speaker_path, pair.listener_path):
                try:
                    emotion = self._emotion(pair.split, path)
                    rows = len(self._load(pair, emotion, read_csv))
                    if rows < WINDOW:
                        self._refuse(pair, emotion, f"it has {rows} rows; a clip has at least {WINDOW} frames")
                    return rows, tuple(self._specs(self._features(pair, path)))
                except ClipError as error:
                    first = first or error
        raise first or ValueError(f"{self.root} has no clips: {', '.join(f'{split}.csv' for split in self.splits)} are empty")

    def _specs(self, features: dict[str, Rows]) -> Iterator[StreamSpec]:
        video, audio = (features.get(folder, {}) for folder in EXTRACTED)
        widths = {name: array.shape[1] for name, array in video.items()} or {name: cut.stop - cut.start for name, cut in NATURAL.items()}
        yield from (StreamSpec(name, "facial", widths[name]) for name in NATURAL)
        yield from (StreamSpec(name, "acoustic", array.shape[1]) for name, array in audio.items())
        if not audio:
            yield StreamSpec("mfcc", "acoustic", MFCC_WIDTH)

    def _person(self, pair: Pair, path: str) -> Rows:
        files = self.root / pair.split
        emotion = self._emotion(pair.split, path)
        attributes = self._targets(pair, emotion, read_csv, "attributes")
        coefficients = self._targets(pair, files / "3D_FV_files" / f"{path}.npy", _read_coefficients, "coefficients") - self._mean_face
        origin = {name: emotion for name in NATURAL}
        inputs: Rows = {name: attributes[:, cut] for name, cut in NATURAL.items()}
        for folder, arrays in self._features(pair, path).items():
            inputs |= arrays
            origin |= dict.fromkeys(arrays, self._feature_file(pair.split, folder, path))
        if "Audio_features" not in self._extracted:
            origin["mfcc"] = files / "Audio_files" / f"{path}.wav"
            inputs["mfcc"] = self._load(pair, origin["mfcc"], read_wav)
        person = {spec.name: self._input(pair, origin[spec.name], spec, inputs[spec.name]) for spec in self.streams}
        targets = {"attributes": attributes, "coefficients": coefficients}
        return person | {name: array[: self.frames].astype(np.float32) for name, array in targets.items()}

    def _features(self, pair: Pair, path: str) -> dict[str, Rows]:
        """The extracted streams of a person, by folder."""
        files = {folder: self._feature_file(pair.split, folder, path) for folder in self._extracted}
        return {folder: self._load(pair, file, partial(read_tensors, names=EXTRACTED[folder])) for folder, file in files.items()}

    def _targets(self, pair: Pair, file: Path, reader: Callable[[Path], np.ndarray], name: str) -> np.ndarray:
        array = self._load(pair, file, reader)
        rows = self._shape[0]
        if array.shape != (rows, TARGETS[name]):
            self._refuse(pair, file, f"{name} have shape {array.shape}; this dataset has {rows} rows and the width must be {TARGETS[name]}")
        if not (np.abs(array) <= FLOAT32_MAX).all():
            self._refuse(pair, file, f"{name} must be finite float32 numbers; {_first_bad(array, FLOAT32_MAX)}")
        return array

    def _input(self, pair: Pair, file: Path, spec: StreamSpec, array: np.ndarray) -> np.ndarray:
        rows = self._shape[0]
        slack = SOUND_SLACK if spec.kind == "acoustic" else 0
        if array.shape[1] != spec.width:
            self._refuse(pair, file, f"stream {spec.name} is {array.shape[1]} wide; in this dataset it is {spec.width} wide")
        if abs(len(array) - rows) > slack:
            rule = f"this dataset has {rows} (sound: give or take {SOUND_SLACK})"
            self._refuse(pair, file, f"stream {spec.name} has {len(array)} rows; {rule}")
        if not (np.abs(array) <= FLOAT16_MAX).all():
            rule = f"must be finite and fit float16, at most {FLOAT16_MAX:.0f}"
            self._refuse(pair, file, f"stream {spec.name} {rule}; {_first_bad(array, FLOAT16_MAX)}")
        half = array[: self.frames].astype(np.float16)
        return np.concatenate([half, np.repeat(half[-1:], self.frames - len(half), axis=0)])

    @cached_property
    def _mean_face(self) -> np.ndarray:
        file = self.root / "external" / "FaceVerse" / "mean_face.npy"
        if not file.is_file():
            raise ValueError(f"{file} is missing: coefficients are differences from this face; copy it from the challenge's code")
        face = read_npy(file).reshape(-1)
        if face.shape != (TARGETS["coefficients"],):
            raise ValueError(f"{file} holds {face.size} numbers; the mean face has {TARGETS['coefficients']}")
        return face

    def _emotion(self, split: str, path: str) -> Path:
        return self.root / split / "Emotion" / f"{emotion_of(path)}.csv"

    def _feature_file(self, split: str, folder: str, path: str) -> Path:
        return self.root / "features" / split / folder / f"{path}.pth"

    def _load(self, pair: Pair, file: Path, reader: Callable[[Path], T]) -> T:
        try:
            return reader(file)
        except FileNotFoundError:
            self._refuse(pair, file, "the file is missing")
        except ValueError as error:
            self._refuse(pair, file, str(error))

    def _refuse(self, pair: Pair, file: Path, rule: str) -> NoReturn:
        raise ClipError(pair.key, str(file.relative_to(self.root)), rule)


def _read_coefficients(file: Path) -> np.ndarray:
    """FaceVerse coefficients (rows, 58), stored as they are or as (rows, 1, 58)."""
    array = read_npy(file)
    return array[:, 0] if array.ndim == 3 and array.shape[1] == 1 else array


def _first_bad(array: np.ndarray, limit: float) -> str:
    row, column = np.argwhere(~(np.abs(array) <= limit))[0]
    return f"row {row}, column {column} is {array[row, column]}"
