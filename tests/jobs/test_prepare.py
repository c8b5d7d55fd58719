"""`jobs/prepare.py` as people use it: from nothing to a dataset, and what it says when files are bad."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import run
from cluster.data.manifest import load_manifest
from cluster.storage import Permanent, Store, open_store
from jobs import prepare as job
from jobs.prepare import main
from reactdiff.data.react2024 import Tree

SCRIPT = Path(__file__).parents[2] / "jobs" / "prepare.py"


def prepare(*arguments: object) -> int:
    """The exit code of the command."""
    try:
        return run(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated") / "tree"
    assert prepare("simulate", root, "--clips", "train=5,val=3", "--frames", 50, "--seed", 3) == 0
    return root


@pytest.fixture
def root(simulated: Path, tmp_path: Path) -> Path:
    """A tree that a test may break."""
    return shutil.copytree(simulated, tmp_path / "tree")


@pytest.mark.usefixtures("local_ray")
def test_bad_files_are_listed_by_clip_and_file_and_all_other_clips_are_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, url = Tree(root).pairs("train"), tmp_path / "data"
    truncated = root / "train" / "3D_FV_files" / f"{pairs[0].speaker_path}.npy"
    truncated.write_bytes(truncated.read_bytes()[:-7])
    nan = root / "train" / "3D_FV_files" / f"{pairs[2].listener_path}.npy"
    numbers = np.load(nan)
    numbers[17, 0, 3] = np.nan
    np.save(nan, numbers)
    gone = root / "train" / "Audio_files" / f"{pairs[4].speaker_path}.wav"
    gone.unlink()
    assert prepare("react2024", root, url, "--clips-per-shard", 2) == 0
    said = "".join(capsys.readouterr().out.split())
    assert -1 < said.find("prepare:8of8clips,100%") < said.find("clipsthatcannotbeused"), "the progress ends before the tables begin"
    for pair, file, rule in ((pairs[0], truncated, ".npy"), (pairs[2], nan, "row17"), (pairs[4], gone, "missing")):
        assert f"clip{pair.key}:{file.relative_to(root)}:" in said and rule in said
    manifest = load_manifest(open_store(str(url)))
    assert manifest.hash in said
    assert manifest.counts("train").sum() == 2 and manifest.counts("val").sum() == 3
    assert prepare("react2024", root, tmp_path / "strict", "--strict") == 1
    said, error = capsys.readouterr()
    assert "3 clips cannot be used" in error
    assert f"clip{pairs[4].key}:" in "".join(said.split())
    assert not list((tmp_path / "strict").glob("*.json"))


@pytest.mark.parametrize("verb", ["react2024", "index"])
def test_a_folder_that_not_all_nodes_see_is_refused_before_anything_is_written(
    verb: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(store: Store, field: str) -> None:
        raise Permanent(f"{field} is {store.url}, but 1 of 2 nodes do not see what is written there")

    monkeypatch.setattr(job, "connect", lambda: None)
    monkeypatch.setattr(job, "assert_visible", blind)
    url = tmp_path / "data"
    (url / "train").mkdir(parents=True)
    (url / "train" / "foreign.tar").write_bytes(b"")
    assert prepare(verb, *([root] if verb == "react2024" else []), url) == 1
    assert f"URL is {url}, but 1 of 2 nodes do not see" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in url.rglob("*") if path.is_file()] == ["foreign.tar"]


@pytest.mark.starts
def test_a_missing_folder_ends_the_program_with_a_file_s_name_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "Emotion")
    done = subprocess.run([sys.executable, SCRIPT, "react2024", root, tmp_path / "data"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: clip NoXI") and "/Emotion/" in done.stderr and "missing" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("react2024 TMP TMP/data", "is no REACT 2024 tree"),
        ("react2024 TREE gs://bucket/x", "'gs://bucket/x' is no store"),
        ("simulate TMP/new --frames 51", "must be a positive multiple of 50"),
        ("simulate TMP/new --clips train", "should be like train=400,val=60,test=60"),
        ("react2024 TREE TMP/data --clips-per-shard 0", "'0' should be a whole number of at least 1"),
        ("index TMP", "there are no tars at TMP: they must lie there as <split>/<name>.tar"),
        ("index TMP --facial gaze --acoustic gaze", "gaze cannot be a stream of both --facial and --acoustic"),
    ],
)
@pytest.mark.starts
def test_mistakes_are_explained_and_nothing_is_written(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    (tmp_path / "something").touch()
    assert prepare(*arguments.replace("TMP", str(tmp_path)).replace("TREE", str(simulated)).split()) != 0
    assert message.replace("TMP", str(tmp_path)) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_inspect_says_what_a_dataset_holds_and_lists_its_clips(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("inspect", shards) == 0
    said = capsys.readouterr().out
    for text in ("100 frames (4 s)", "mfcc", "coefficients", "train", "test", "a.attributes", "100 x 25"):
        assert text in said
    assert prepare("inspect", shards, "--split", "test", "--keys") == 0
    keys = capsys.readouterr().out.split()
    assert len(keys) == 8
    assert prepare("inspect", shards, "--split", "test", "--clip", keys[3]) == 0
    assert f"clip {keys[3]} of test" in capsys.readouterr().out


@pytest.mark.usefixtures("local_ray")
def test_tars_of_other_programs_are_indexed_inspected_and_verified_or_refused_in_one_sentence(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "tars"
    for number, split in enumerate(("train", "train", "test")):
        (url / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(shards / split / f"00000{number % 2}.tar", url / split / f"part-{number}.tar")
    shutil.copy(url / "train/part-0.tar", url / "train/bad.tar")
    with open(url / "train/bad.tar", "r+b") as tar:
        tar.truncate(100_000)
    assert prepare("index", url) == 1
    assert "error: train/bad.tar is no whole tar" in capsys.readouterr().err
    assert not (url / "dataset.json").exists()
    (url / "train/bad.tar").unlink()
    assert prepare("index", url) == 0
    said = capsys.readouterr().out
    manifest = load_manifest(open_store(str(url)))
    assert manifest.hash in said and "ignored files" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [[row[column] for column in (0, 1, 2, 3, 5)] for row in rows] == [["test", "6", "6", "1", "6"], ["train", "12", "12", "2", "12"]]
    assert prepare("index", url) == 0
    assert "nothing to add: the dataset already holds every tar" in capsys.readouterr().out
    assert prepare("verify", url) == prepare("inspect", url, "--split", "train") == 0
    said = capsys.readouterr().out
    assert f"state {manifest.hash} of {url} is whole" in said and "a.attributes" in said and "100 frames (4 s)" in said
