"""jobs/generate.py as people use it: the reactions that the evaluation scores, as files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.command import run
from cluster.opened import open_run
from cluster.reader import Reader
from cluster.storage import open_store
from jobs.generate import main
from reactdiff.data.files import read_csv
from tests.tiny import FRAMES, job

CLIP = 5
"""Number of the clip in the test split."""


def generate(*arguments: object) -> int:
    """The exit code of the command; the process computes afterwards as before."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        return run(lambda: main([str(argument) for argument in arguments]))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def key(finished: Path) -> str:
    opened = open_run(str(finished), "")
    return Reader(open_store(opened.experiment.data.url), opened.clips, "test").key(CLIP)


@pytest.fixture(scope="module")
def made(finished: Path, key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of both directions, made from a run whose latents are gone."""
    store, out = tmp_path_factory.mktemp("without") / "store", tmp_path_factory.mktemp("made")
    shutil.copytree(finished.parent.parent, store, ignore=shutil.ignore_patterns("latents", "checkpoints"))
    assert generate("tiny", "--store", store, "--clip", key, "--direction", "both", "--count", 2, "--out", out) == 0
    yield out


def test_the_reactions_are_those_the_evaluation_scored(finished: Path, made: Path, key: str) -> None:
    parts = sorted((finished / "evaluation").glob("*/model-*.predictions.npy"))
    predictions = np.concatenate([np.load(part) for part in parts])
    clips = len(predictions) // 2
    for direction in (0, 1):
        attributes = np.load(made / f"{key}-{direction}.npz")["attributes"]
        item = CLIP + clips * direction
        distance = np.abs(predictions - attributes).max((1, 2, 3))
        # A run this small hardly reacts: equal means far nearer than the reactions to any other item.
        assert distance[item] < 1e-5 and distance[item] < np.delete(distance, item).min() / 5


def test_files_are_arrays_official_tables_and_a_picture(made: Path, key: str) -> None:
    names = [f"{key}-{direction}{rest}" for direction in (0, 1) for rest in ("-0.csv", "-1.csv", ".npz", ".png")]
    assert sorted(path.name for path in made.iterdir()) == sorted(names)
    arrays = np.load(made / f"{key}-1.npz", allow_pickle=False)
    assert arrays["attributes"].shape == (2, FRAMES, 25) and arrays["coefficients"].shape == (2, FRAMES, 58)
    np.testing.assert_allclose(read_csv(made / f"{key}-1-1.csv"), arrays["attributes"][1], rtol=5e-6)
    assert (made / f"{key}-1.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_reactions_have_the_same_bytes_whatever_else_is_asked_for(finished: Path, made: Path, key: str, tmp_path: Path) -> None:
    assert generate(finished, "--clip", key, "--split", "test", "--count", 2, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{key}-0{rest}" for rest in ("-0.csv", "-1.csv", ".npz", ".png")]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name


def test_an_unknown_clip_is_answered_with_the_nearest_keys(
    finished: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(finished, "--clip", f"{key[:-1]}x", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"none of the 8 clips of the split has the key '{key[:-1]}x'; the nearest: {key[:-1]}" in error
    assert not (tmp_path / "out").exists()


def test_help_teaches_with_examples() -> None:
    text = job("generate", "--help").stdout
    assert "jobs/generate.py demo-1a2b3c4d --clip KEY" in text and "--direction {0,1,both}" in text
