"""A simulation as an official tree: every file of a clip written whole or not at all, the split CSVs last."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from reactdiff.clip import ATTRIBUTES, TARGETS
from reactdiff.data.appropriateness import INDICES, MATRIX
from reactdiff.data.keyed import generator
from reactdiff.data.paths import emotion_of, recording_of, subject_of
from reactdiff.data.synthetic.face import Face, coefficients_of
from reactdiff.data.synthetic.senses import SAMPLE_RATE, features_of, voice_of
from reactdiff.data.synthetic.simulation import Simulation, dyad

Progress = Callable[[int, int], None]
CHUNK = 8
"""Clips that a process writes before it reports."""


def write_tree(simulation: Simulation, root: str | Path, progress: Progress | None = None, workers: int | None = None) -> None:
    """Write the simulated dataset under `root`; what is there already stays, so it resumes, and grows with `simulation.clips`.

    Args:
        simulation: what to write.
        root: folder of the tree.
        progress: called with (clips done, clips in all) now and then.
        workers: processes; one for each core by default, and no extra process for 1.

    Raises:
        ValueError: if `root` holds another simulation, or more clips than this one has.
    """
    root = Path(root)
    _claim(simulation, root)
    clips = [(split, clip) for split in simulation.splits for clip in range(simulation.clips[split])]
    missing = [place for place in clips if not all(file.exists() for file in _files(simulation, root, *place))]
    done = len(clips) - len(missing)
    report = progress or (lambda done, count: None)
    report(done, len(clips))
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    for written in _spread(partial(_write_clips, simulation, root), chunks, workers or len(os.sched_getaffinity(0))):
        done += written
        report(done, len(clips))
    _write_lists(simulation, root)


def appropriate(simulation: Simulation) -> np.ndarray:
    """The official matrix of all splits together, (2n, 2n) uint8: 1 for clips of the same script and direction."""
    scripts = [(split, simulation.script(clip)) for split in simulation.splits for clip in range(simulation.clips[split])]
    number = {script: index for index, script in enumerate(dict.fromkeys(scripts))}
    numbers = np.array([number[script] for script in scripts])
    same = (numbers[:, None] == numbers).astype(np.uint8)
    return np.block([[same, np.zeros_like(same)], [np.zeros_like(same), same]])


def _claim(simulation: Simulation, root: Path) -> None:
    """Put the settings where `oracle` finds them, unless the folder is something else's."""
    file = root / "simulator.json"
    if file.exists():
        there = Simulation.of(json.loads(file.read_text()))
        settings = [(one.seed, one.frames, one.sharing) for one in (there, simulation)]
        shrinks = {split for split, count in there.clips.items() if simulation.clips.get(split, 0) < count}
        if settings[0] != settings[1] or shrinks:
            raise ValueError(f"{root} holds {there}, which cannot become {simulation}: only `clips` may grow; choose another folder")
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty and holds no simulation; choose an empty folder")
    _put(file, json.dumps(simulation.provenance(), indent=2).encode())


def _files(simulation: Simulation, root: Path, split: str, clip: int) -> Iterator[Path]:
    for path in simulation.paths(split, clip):
        yield root / split / "Emotion" / f"{emotion_of(path)}.csv"
        yield root / split / "3D_FV_files" / f"{path}.npy"
        yield root / split / "Audio_files" / f"{path}.wav"
        yield root / "features" / split / "Video_features" / f"{path}.pth"


def _spread(work: Callable[[Any], int], chunks: list[Any], workers: int) -> Iterator[int]:
    if workers == 1 or len(chunks) < 2:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, chunk) for chunk in chunks]):
            yield future.result()


def _write_clips(simulation: Simulation, root: Path, clips: list[tuple[str, int]]) -> int:
    for split, clip in clips:
        files = iter(_files(simulation, root, split, clip))
        for person, (face, path) in enumerate(zip(dyad(simulation, split, clip), simulation.paths(split, clip), strict=True)):
            rng = generator("synthetic", simulation.seed, split, "clip", clip, "senses", person)
            pitch = generator("synthetic", simulation.seed, "pitch", split, subject_of(path)).uniform(90, 220)
            for content in _contents(face, pitch, rng):
                _put(next(files), content)
    return len(clips)


def _contents(face: Face, pitch: float, rng: np.random.Generator) -> Iterator[bytes]:
    """A person's files, in the order of `_files`."""
    table = io.StringIO()
    np.savetxt(table, face.attributes, fmt=["%d"] * 15 + ["%.6f"] * 10, delimiter=",", header=",".join(ATTRIBUTES), comments="")
    yield table.getvalue().encode()
    coefficients = np.zeros(TARGETS["coefficients"], np.float32) + coefficients_of(face, rng) + _faces()["mean_face"]
    yield _saved(np.save, coefficients[:, None].astype(np.float32))
    sound = io.BytesIO()
    soundfile.write(sound, voice_of(face, pitch, rng), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    yield sound.getvalue()
    tensors = [torch.from_numpy(rows) for rows in features_of(face, rng).values()]
    yield _saved(lambda file, content: torch.save(content, file), tensors)


def _write_lists(simulation: Simulation, root: Path) -> None:
    """What makes the files a dataset: the faces, the appropriateness matrix with its index, and the splits."""
    for name, values in _faces().items():
        _put(root / "external" / "FaceVerse" / f"{name}.npy", _saved(np.save, values))
    pairs = {split: [simulation.paths(split, clip) for clip in range(simulation.clips[split])] for split in simulation.splits}
    speakers = [pair[0] for split in simulation.splits for pair in pairs[split]]
    _put(root / MATRIX, _saved(np.save, appropriate(simulation)))
    _put(root / INDICES, _csv(["site", "chat_index", "clip_index"], map(recording_of, speakers)))
    for split in simulation.splits:
        _put(root / f"{split}.csv", _csv(["", "speaker_path", "listener_path"], ([row, *pair] for row, pair in enumerate(pairs[split]))))


def _faces() -> dict[str, np.ndarray]:
    rng = generator("synthetic", "faces")
    return {
        "mean_face": (0.2 * rng.standard_normal(TARGETS["coefficients"])).astype(np.float32),
        "std_face": np.full(TARGETS["coefficients"], 0.3, np.float32),
    }


def _csv(header: list[str], rows: Iterable[Iterable[Any]]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue().encode()


def _saved(save: Callable[[Any, Any], object], content: Any) -> bytes:
    file = io.BytesIO()
    save(file, content)
    return file.getvalue()


def _put(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    part.replace(file)
