"""A tiny tree in the official layout, made of plain random numbers, to read and to break."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import torch

from reactdiff.clip import ATTRIBUTES
from reactdiff.data.paths import emotion_of
from reactdiff.data.react2024 import Tree

NOXI = ("NoXI/065_2016-04-14_Nottingham/Expert_video/1", "NoXI/065_2016-04-14_Nottingham/Novice_video/1")
RECOLA = ("RECOLA/group-1/P26/2", "RECOLA/group-1/P25/2")
UDIVA = ("UDIVA/talk/023102/FC1/8", "UDIVA/talk/023102/FC2/8")
PAIRS = (NOXI, RECOLA, UDIVA)

ROWS = 51
WIDTHS = {"va": 3, "au": 7, "fer": 5, "mfcc": 26, "w2v": 6}
MEAN_FACE = np.linspace(-1, 1, 58, dtype=np.float32)


def attributes_of(path: str) -> np.ndarray:
    return _numbers("attributes", path).random((ROWS, 25)).astype(np.float32)


def coefficients_of(path: str) -> np.ndarray:
    return _numbers("coefficients", path).standard_normal((ROWS, 58)).astype(np.float32)


def features_of(path: str, name: str, rows: int = ROWS) -> np.ndarray:
    return _numbers(name, path).standard_normal((rows, WIDTHS[name])).astype(np.float32)


def make(root: Path, splits: dict[str, tuple[tuple[str, str], ...]], video: bool = False, audio: bool = False, rate: int = 16_000) -> Tree:
    """Write the tree and open it; `video` and `audio` add extracted features."""
    save(root / "external/FaceVerse/mean_face.npy", MEAN_FACE)
    for split, pairs in splits.items():
        write_csv(root / f"{split}.csv", [["", "speaker_path", "listener_path"], *([n, *pair] for n, pair in enumerate(pairs))])
        for path in (path for pair in pairs for path in pair):
            write_person(root, split, path, video, audio, rate)
    return Tree(root)


def write_person(root: Path, split: str, path: str, video: bool, audio: bool, rate: int) -> None:
    write_csv(root / split / "Emotion" / f"{emotion_of(path)}.csv", [ATTRIBUTES, *attributes_of(path)])
    save(root / split / "3D_FV_files" / f"{path}.npy", coefficients_of(path))
    wav = root / split / "Audio_files" / f"{path}.wav"
    wav.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(wav, 0.1 * _numbers("sound", path).standard_normal(ROWS * rate // 25), rate, subtype="PCM_16")
    for folder, names in {"Video_features": ("va", "au", "fer") * video, "Audio_features": ("mfcc", "w2v") * audio}.items():
        if names:
            save_tensors(root / "features" / split / folder / f"{path}.pth", [features_of(path, name) for name in names])


def write_csv(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, array)


def save_tensors(file: Path, arrays: list[np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save([torch.from_numpy(array) for array in arrays], file)


def _numbers(kind: str, path: str) -> np.random.Generator:
    return np.random.default_rng(list(f"{kind}:{path}".encode()))
