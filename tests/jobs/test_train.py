"""jobs/train.py as a user runs it."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cluster import cli
from cluster.config.loading import to_yaml
from cluster.data.reader import Reader
from cluster.driver.pin import pin
from cluster.evaluation.picture import clip_picture, read_faces
from cluster.runs import lease
from cluster.runs.lease import Lease
from cluster.runs.saved import open_run
from cluster.runs.state import State, write_state
from cluster.storage import open_store
from jobs import train, tune
from tests.jobs.test_generate import generate
from tests.tiny import OVERRIDES, ROOT, Trained, call, settings, tiny

DEMO = ROOT / "jobs/configs/demo.yaml"


def test_a_run_ends_done_with_exports_scores_and_curves(finished: Path) -> None:
    state = json.loads((finished / "state.json").read_text())
    assert (state["status"], state["life"], state["stage"]) == ("DONE", 1, "evaluation")
    for stage in ("autoencoder", "diffusion"):
        assert list((finished / "exports" / stage).glob("*.safetensors"))
        assert list((finished / "tensorboard" / stage).glob("events*"))
    assert not (finished / "ray").exists(), "what Ray Train notes for itself is not the run's"
    (report,) = (finished / "evaluation").glob("test-*.json")
    scores = json.loads(report.read_text())["scores"]
    assert {"model", "oracle", "mimic", "wrong speaker"} <= scores.keys()


def test_a_run_that_denoises_attributes_themselves_has_one_stage_and_all_that_follows_it(shards: Path, tmp_path: Path) -> None:
    """Online in chunks, with a clean history: the widest way from the keys of the configuration to reactions."""
    direct = (
        *("model.space=attributes", "model.denoiser=transformer", "model.online=true", "model.chunk=10", "model.patch=5"),
        *("model.lags=[5,10]", "model.width=16", "model.layers=1", "diffusion.normalisation=variance"),
        *("diffusion.schedule=karras", "diffusion.times=log-normal", "diffusion.loss=squared", "diffusion.history=clean"),
        *("diffusion.history_swap=0.3", "diffusion.history_noise=0.5", "diffusion.stream_dropout=0.1", "diffusion.smoothing=0.6"),
        "evaluation.baselines=false",
    )
    command = ("train", "--config", DEMO, "run.name=direct", "workers.cpus=2", *settings(shards, tmp_path), *direct)
    said = call(*command)
    folder = tmp_path / "runs/direct"
    assert json.loads((folder / "state.json").read_text())["status"] == "DONE" and "nothing to train" in said.stdout
    assert not (folder / "checkpoints/autoencoder").exists() and len(list((folder / "exports").glob("*/*.safetensors"))) == 2
    (report,) = (folder / "evaluation").glob("test-*.json")
    scores = json.loads(report.read_text())["scores"]
    assert set(scores) == {"model", "units cut at 0.5"} and scores["model"]["official"] != scores["units cut at 0.5"]["official"]
    again = call(*command)
    assert "stage diffusion is done" in again.stdout
    opened = open_run(str(folder), "")
    key = Reader(opened.dataset, opened.clips, "test").key(0)
    assert generate(folder, "--clip", key, "--count", 2, "--out", tmp_path / "out") == 0
    assert {"attributes", "coefficients"} <= set(np.load(next((tmp_path / "out").glob("*.npz"))))


def test_a_finished_run_says_so_and_ends(finished: Path, shards: Path, tmp_path: Path) -> None:
    store = shutil.copytree(finished.parent.parent, tmp_path / "store")
    (picture,) = (store / "runs/tiny/evaluation").glob("*.png")
    drawn = picture.stat().st_mtime_ns
    done = call("train", "--config", DEMO, "run.name=tiny", *settings(shards, store))
    assert "stage autoencoder is done" in done.stdout and "from random listener (0 %) to oracle (100 %): model" in done.stdout
    assert str(picture) in done.stdout and picture.stat().st_mtime_ns == drawn and len(commands(done.stdout)) >= 4


def test_a_run_that_another_driver_is_at_is_left_alone_with_no_wait(
    finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "LOOK", 0.05)
    store = shutil.copytree(finished.parent.parent, tmp_path / "store")
    before = sorted(path.name for path in (store / "runs/tiny/lives").iterdir())
    with Lease(open_store(str(store / "runs/tiny")), "python jobs/train.py"):
        said = call("train", "--config", DEMO, "--no-wait", "run.name=tiny", *settings(shards, store), check=False)
    assert said.returncode != 0 and f"error: {store}/runs/tiny is held by host " in said.stderr
    assert sorted(path.name for path in (store / "runs/tiny/lives").iterdir()) == before


def commands(said: str) -> list[list[str]]:
    """The words of each command that a run ends with."""
    _, _, below = said.partition("\nWhat to type next:\n")
    return [shlex.split(line) for line in below.splitlines() if line.startswith("    ")]


def test_a_run_leaves_a_picture_of_reactions_that_it_scored(trained: Trained) -> None:
    found = re.search(r"its reactions to clip (\S+) of split test, beside the real one: (\S+)", trained.stdout)
    assert found and str(trained.folder) in trained.stdout
    run, (key, picture) = open_run(str(trained.folder), ""), found.groups()
    reader = Reader(open_store(run.experiment.data.url), run.clips, "test")
    (part,) = trained.folder.glob("evaluation/*/model-000000000.predictions.npy")
    assert reader.find_clip(key) == 0
    assert Path(picture).read_bytes() == clip_picture(key, read_faces(reader, 0), 0, np.load(part)[0], "run tiny")


def test_the_commands_that_a_run_ends_with_work(trained: Trained, tmp_path: Path, monkeypatch, capsys) -> None:
    programs = {" ".join(words[:1] if words[0] != "python" else [Path(words[1]).name]): words for words in commands(trained.stdout)}
    assert set(programs) - {"."} == {"tensorboard", "generate.py", "ray"}, "without a val split no sweep is offered"
    assert sorted(path.name for path in Path(programs["tensorboard"][2]).iterdir()) == ["autoencoder", "diffusion"]
    assert generate(*programs["generate.py"][2:], "--count", 1, "--out", tmp_path) == 0 and len(list(tmp_path.iterdir())) == 3
    submitted = programs["ray"]
    assert submitted[:7] == "ray job submit --working-dir . -- python".split()
    monkeypatch.setattr(sys, "argv", [*submitted[7:], "--dry-run"])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert train.main() == 0
    assert f"runtiny(exists)in{trained.folder}" in "".join(capsys.readouterr().out.split()), "it is this run that goes on there"


def test_a_picture_that_cannot_be_drawn_is_said_and_the_rest_is_too(every_split: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    experiment = tiny(every_split / "shards", tmp_path / "store")
    pinned = pin(experiment, "tiny")
    pinned.store.put("config.yaml", to_yaml(experiment).encode())
    write_state(pinned.store, State("DONE", 1, pinned.manifest.identity, pinned.manifest.hash))
    train._say_what_next(open_run(pinned.store.url, ""), [])
    said = capsys.readouterr().out
    assert "no picture of its reactions: " in said and "generate.py" not in said
    (sweep,) = [words for words in commands(said) if words[1].endswith("tune.py")]
    monkeypatch.setattr(sys, "argv", [*sweep[1:], *OVERRIDES])
    assert tune.main() == 0 and "PENDING" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the job says on stderr when it refuses to start; in this process, since nothing is started."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert cli.run(train.main) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, "one paragraph"
    return said


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    return partial(refused, capsys, monkeypatch)


def test_a_run_name_with_another_identity_is_refused_with_the_differing_field(finished: Path, shards: Path, refusal) -> None:
    before = sorted(path.name for path in (finished / "lives").iterdir())
    said = refusal("--config", str(DEMO), "run.name=tiny", *settings(shards, finished.parent.parent), "model.hidden=64")
    assert "run tiny exists with another identity; differing: model.hidden (was 32, now 64)" in said
    assert sorted(path.name for path in (finished / "lives").iterdir()) == before


@pytest.mark.parametrize(
    ("end", "why"),
    [("optim.epochs=0.5", "the end of a run may only grow"), ("optim.epochs=2", "grow optim.epochs.diffusion alone")],
)
def test_an_end_that_would_shrink_or_leave_other_latents_behind_is_refused(
    finished: Path, shards: Path, refusal, end: str, why: str
) -> None:
    assert why in refusal("--config", str(DEMO), "run.name=tiny", *settings(shards, finished.parent.parent), end)


def test_a_wrong_key_is_refused_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no key optim.warm_up; did you mean optim.warmup?" in refusal("optim.warm_up=1")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dataset_names_url_key_and_the_command_that_makes_one(tmp_path: Path, refusal) -> None:
    said = refusal("--config", str(DEMO), f"data.url={tmp_path}/none", f"run.store={tmp_path}/store")
    assert f"no dataset at {tmp_path}/none" in said and "jobs/prepare.py react2024" in said and "data.url" in said
    assert not (tmp_path / "store").exists()


def test_a_dry_run_prints_the_plan_and_starts_nothing(shards: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    rate = ["optim.lr.diffusion=1e-3", "optim.warmup.diffusion=10", "optim.decay.diffusion=40"]
    here = [*settings(shards, tmp_path / "store"), "workers.count=3", "workers.zero=3", *rate]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(DEMO), *here, "--dry-run"])
    monkeypatch.setenv("COLUMNS", "160")
    assert train.main() == 0
    printed = capsys.readouterr().out
    for said in (
        "parameters of encoder",
        "1 epochs x 40 items / 6 = 7",
        "rises until item 10 to 0.001, falls to 1% of it until item 40",
        "6 / 3 ranks = 2",
        "ZeRO-3",
        "tensor au",
        "3 CPUs, 0 GPUs",
        "GFLOP",
        "most memory / rank (ZeRO-3)",
        " tensors + 0.55 libraries + 0.51 read ahead + ",
    ):
        assert said in printed, said
    assert not (tmp_path / "store").exists()


@pytest.mark.starts  # DeepSpeed asks a compiler what it could compile
def test_a_dry_run_without_the_data_prints_all_that_does_not_depend_on_them(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(ROOT / "jobs/configs/react2024.yaml"), "--dry-run"])
    assert train.main() == 0
    printed = capsys.readouterr().out
    for said in (
        f"there is no dataset at {tmp_path}/work/react2024/shards",
        "python jobs/prepare.py react2024 TREE",
        "assumption until then: the widths of the authors' features (va 64, au 25088, fer 1408, mfcc 26, w2v 1536; 750 frames a clip)",
        "124,706,387",
        "417,422,898",
        "200 epochs x the dataset's items / 16",
        "(2, 750, 25088) = 150.5 MB",
        "834.8 MB",
        "most GPU memory / rank (ZeRO-2)",
        " tensors + 0.10 buckets + 0.01 two batches + 2.17 copy that is scored",
        "2.19 GB = 0.55 libraries + 0.81 read ahead + 0.83 copy for checkpoints",
        "32 CPUs, 8 GPUs",
    ):
        assert said in printed, said
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run"])
    assert train.main() == 0 and "without --dry-run this command simulates it (va 8, au 64," in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "workers.count=1"])
    assert train.main() == 0 and "ZeRO-1" not in (printed := capsys.readouterr().out) and "fp32 masters / rank (ZeRO-0, fp32)" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_over_a_damaged_dataset_is_refused(tmp_path: Path, refusal) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    assert "should be" in refusal("--dry-run", "--config", str(DEMO), f"data.url={tmp_path}", f"run.store={tmp_path}/store")


def test_help_teaches_every_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    text = capsys.readouterr().out
    assert "optim.lr" in text and "Peak learning rate" in text and "--dry-run" in text
