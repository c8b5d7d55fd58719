"""`jobs/prepare.py` as people use it: from nothing to a dataset, and what it says when files are bad."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.manifest import load_manifest
from cluster.storage import open_store
from reactdiff.data.react2024 import Tree

SCRIPT = Path(__file__).parents[2] / "jobs" / "prepare.py"


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], check=False, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated") / "tree"
    done = prepare("simulate", root, "--clips", "train=6,val=4", "--frames", 50, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert "6 train, 4 val clips of 50 frames, seed 3" in done.stdout
    return root


@pytest.fixture
def root(simulated: Path, tmp_path: Path) -> Path:
    """A tree that a test may break."""
    return shutil.copytree(simulated, tmp_path / "tree")


def test_bad_files_are_listed_by_clip_and_file_and_all_other_clips_are_there(root: Path, tmp_path: Path) -> None:
    pairs, url = Tree(root).pairs("train"), tmp_path / "data"
    truncated = root / "train" / "3D_FV_files" / f"{pairs[0].speaker_path}.npy"
    truncated.write_bytes(truncated.read_bytes()[:-7])
    nan = root / "train" / "3D_FV_files" / f"{pairs[2].listener_path}.npy"
    numbers = np.load(nan)
    numbers[17, 0, 3] = np.nan
    np.save(nan, numbers)
    gone = root / "train" / "Audio_files" / f"{pairs[5].speaker_path}.wav"
    gone.unlink()
    done = prepare("react2024", root, url, "--clips-per-shard", 2)
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.split())
    for pair, file, rule in ((pairs[0], truncated, ".npy"), (pairs[2], nan, "row17"), (pairs[5], gone, "missing")):
        assert f"clip{pair.key}:{file.relative_to(root)}:" in said and rule in said
    manifest = load_manifest(open_store(str(url)))
    assert manifest.hash in done.stdout
    assert manifest.counts("train").sum() == 3 and manifest.counts("val").sum() == 4
    strict = prepare("react2024", root, tmp_path / "strict", "--strict")
    assert strict.returncode == 1
    assert "3 clips cannot be used" in strict.stderr and "Traceback" not in strict.stderr
    assert f"clip{pairs[5].key}:" in "".join(strict.stdout.split())
    assert not list((tmp_path / "strict").glob("*.json"))


@pytest.mark.parametrize("folder", ["Emotion", "3D_FV_files"])
def test_a_missing_folder_is_an_error_that_names_a_file_and_nothing_is_written(root: Path, tmp_path: Path, folder: str) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / folder)
    done = prepare("react2024", root, tmp_path / "data")
    assert done.returncode == 1
    assert folder in done.stderr and "missing" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["react2024", "TMP", "TMP/data"], "is no REACT 2024 tree"),
        (["react2024", "TREE", "gs://bucket/x"], "'gs://bucket/x' is no store"),
        (["simulate", "TMP/new", "--frames", "51"], "must be a positive multiple of 50"),
        (["simulate", "TMP/new", "--clips", "train"], "should be like train=400,val=60,test=60"),
        (["react2024", "TREE", "TMP/data", "--clips-per-shard", "0"], "'0' should be a whole number of at least 1"),
    ],
)
def test_mistakes_are_explained_in_a_line(simulated: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "something").touch()
    done = prepare(*(argument.replace("TMP", str(tmp_path)).replace("TREE", str(simulated)) for argument in arguments))
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
