"""jobs/generate.py as people use it: the reactions that the evaluation scores, as files; and those of the authors' weights."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import run
from cluster.data.build_shard import ShardSource, build_shard
from cluster.data.manifest import Manifest, ShardTable, Split, StreamEntry, load_manifest, publish
from cluster.data.reader import Reader
from cluster.data.shards import members
from cluster.runs.latents import encode_clip
from cluster.runs.saved import open_run
from cluster.storage import open_store
from jobs.generate import main
from reactdiff.clip import PERSONS, TARGETS, WINDOW
from reactdiff.config import Diffusion
from reactdiff.data.files import read_csv
from reactdiff.data.keyed import normal
from reactdiff.data.sample import Clip
from reactdiff.generate import Reactor
from reactdiff.model.published import autoencoder_sources, load_published
from tests.reactdiff.model.published import write_files
from tests.reactdiff.model.rule import DATA, Case
from tests.tiny import FRAMES, call

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
    assert f"none of the 8 clips of split test has the key '{key[:-1]}x'; the nearest: {key[:-1]}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_key_is_refused_before_anything_is_opened(empty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("nobody", "--clip", empty) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: KEY is empty: ") and "python jobs/prepare.py inspect URL --split S --keys" in error
    assert error.count("\n") == 1


@dataclass(frozen=True)
class Authors:
    """A fixture as people have it: the inputs in the shards of a dataset, the weights in the authors' files.

    Attributes:
        case: the fixture.
        data: URL of the dataset; person a of its clip `fixture` has the fixture's streams, as far as float16 goes.
        files: stage 1, stage 2 and the projector.
        shift: the files' range is [shift - 1, shift + 1]. With it the fixture's own latent is, normalised, its `speaker_latent`,
            so that one clip leads through all of the fixture's outputs.
    """

    case: Case
    data: Path
    files: tuple[Path, Path, Path]
    shift: torch.Tensor


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Authors:
    case, folder = Case(DATA / "parity_small.npz"), tmp_path_factory.mktemp("authors")
    speaker = case.input("speaker_latent", case.frames // WINDOW, WINDOW, case.latent).reshape(case.frames, case.latent)
    shift = torch.from_numpy(case.expected["latent"][0]) - speaker
    pack(case, folder / "shards")
    return Authors(case, folder / "shards", write_files(case, folder, shift - 1, shift + 1), shift)


def pack(case: Case, folder: Path) -> None:
    """A dataset of one clip in split val."""
    streams = {"a": {s.name: case.input(s.name, case.frames, s.width).numpy() for s in case.streams}}
    streams["b"] = {name: normal(array.shape, "listener", name) for name, array in streams["a"].items()}
    targets = {name: np.zeros((case.frames, width), np.float32) for name, width in TARGETS.items()}
    clip = Clip("fixture", {p: {name: array.astype(np.float16) for name, array in streams[p].items()} | targets for p in PERSONS})

    class Tree:
        splits, frames = ("val",), case.frames
        streams = tuple(case.streams)

        def read(self, pair: Clip) -> Clip:
            return pair

    source = ShardSource(Tree(), open_store(str(folder)), strict=True)  # type: ignore[arg-type]
    shards = ShardTable().plus({0: build_shard(source, "val/000000", [clip]).info})
    described = [StreamEntry(**asdict(stream)) for stream in case.streams]
    arrays = list(members(source.arrays))
    manifest = Manifest(
        kind="clips", frames=case.frames, streams=described, targets=TARGETS, members=arrays, splits={"val": Split(shards=shards)}
    )
    publish(open_store(str(folder)), manifest)


def imported(authors: Authors, *more: object, files: int = 3) -> int:
    """The exit code of `generate.py --import-checkpoint`, widths and all else left to the files and the default configuration."""
    overrides = (f"data.url={authors.data}", "workers.threads=1")
    return generate("--import-checkpoint", *authors.files[:files], "--clip", "fixture", *overrides, "--count", 2, *more)


def test_the_authors_files_give_what_the_library_gives_on_the_same_inputs(
    authors: Authors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit on one thread, with the noise keyed by the seed that is asked for."""
    assert imported(authors, "seed=7", "--direction", "both", "--out", tmp_path) == 0
    assert "ignored 2 weights that the authors' model never uses" in (error := capsys.readouterr().err) and "UNTRAINED" not in error
    store, model = open_store(str(authors.data)), authors.case.model
    manifest = load_manifest(store)
    made = load_published(model, Diffusion(normalisation="frame"), authors.case.streams, *authors.files)
    latents = encode_clip(made.autoencoder, Reader(store, manifest, "val"), 0)
    # Rounding of inputs and latents to float16 is all that parts the clip from the fixture.
    assert 0 < np.abs(latents["a"] - authors.case.expected["latent"][0]).max() < 3e-3
    for direction, speaker in enumerate(PERSONS):
        expected = Reactor(made.autoencoder, made.diffusion).react(latents[speaker][None], [("fixture", direction)], 2, seed=7)
        arrays = np.load(tmp_path / f"fixture-{direction}.npz")
        assert all(np.array_equal(arrays[name], expected[name][0]) for name in ("attributes", "coefficients"))


def test_the_authors_files_reproduce_the_fixture_from_its_inputs_to_its_sample(
    authors: Authors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's streams, noise and weights lead to the fixture's last DDIM sample, decoded.

    The fixture's outputs hang together here: `latent` of the streams is, in the files' range, `speaker_latent`, which gives
    `condition`, which with the noise gives `ddim20_sample`. Only the noise, which a job draws by key, is put in its place.
    """
    case = authors.case
    noise = case.input("noise", case.frames // WINDOW, WINDOW, case.latent).numpy()
    monkeypatch.setattr("reactdiff.generate.generation_noise", lambda *key: noise)
    assert imported(authors, "--out", tmp_path / "with") == imported(authors, "--out", tmp_path / "without", files=2) == 0
    autoencoder = case.autoencoder()
    case.fill(autoencoder, autoencoder_sources(autoencoder), "stage1")
    sample = torch.from_numpy(case.expected["ddim20_sample"]).reshape(authors.shift.shape) + authors.shift
    with torch.no_grad():
        expected = autoencoder.decode(sample[None])
    arrays, untrained = (np.load(tmp_path / name / "fixture-0.npz") for name in ("with", "without"))
    for name, theirs in expected.items():
        # Seen: 2e-4, where the values' deviation is 0.7. It is float16's rounding of the inputs: in float32 it is 2e-5.
        assert np.abs(arrays[name] - theirs.numpy()).max() < 1e-3
        assert np.abs(untrained[name] - theirs.numpy()).max() > 0.1


def test_a_missing_projector_is_said_loudly_and_generates_all_the_same(
    authors: Authors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(authors, "--out", tmp_path, files=2) == 0
    error = capsys.readouterr().err
    assert "WARNING: THE CONDITION IS UNTRAINED" in error and "give their file as the third: STAGE1.pth STAGE2.pth [PROJECTOR.pth]" in error
    assert (tmp_path / "fixture-0.npz").exists()


def test_overrides_may_follow_the_files_and_a_wrong_file_is_one_sentence(
    authors: Authors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage1, stage2, _ = authors.files
    out = ("--out", tmp_path / "out")
    assert generate(*out, "--clip", "fixture", "--import-checkpoint", stage1, tmp_path / "none.pth", f"data.url={authors.data}") == 1
    assert f"error: there is no file {tmp_path}/none.pth" in capsys.readouterr().err
    torch.save(dict(torch.load(stage1, weights_only=True)) | {"config": Path()}, tmp_path / "pickle.pth")
    assert generate("--import-checkpoint", tmp_path / "pickle.pth", stage2, "--clip", "fixture", f"data.url={authors.data}", *out) == 1
    kind = f"{type(Path()).__module__}.PosixPath"  # Python 3.13 has another module
    assert f"error: {tmp_path}/pickle.pth holds {kind} objects, and only tensors" in capsys.readouterr().err
    short = write_files(authors.case, tmp_path, authors.shift[:WINDOW] - 1, authors.shift[:WINDOW] + 1)
    assert generate("--import-checkpoint", *short, "--clip", "fixture", f"data.url={authors.data}", *out) == 1
    assert f"{short[0]} has the latents' range of 50 frames, but clips of {authors.data} have 100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "name a RUN to generate with, or --import-checkpoint STAGE1.pth STAGE2.pth [PROJECTOR.pth]"),
        (["--import-checkpoint", "one.pth"], "takes STAGE1.pth STAGE2.pth [PROJECTOR.pth] instead of RUN, not one.pth"),
        (["run", "--config", "mine.yaml"], "a run has its own configuration; --config goes with --import-checkpoint"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate("--clip", "key", *arguments)
    assert rule in capsys.readouterr().err


def test_help_teaches_with_examples() -> None:
    text = call("generate", "--help").stdout
    assert "jobs/generate.py --import-checkpoint STAGE1.pth STAGE2.pth PROJECTOR.pth --clip KEY" in text
    assert "jobs/generate.py demo-1a2b3c4d --clip KEY" in text and "--direction {0,1,both}" in text
