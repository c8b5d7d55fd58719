"""jobs/train.py as a user runs it."""

import json
from pathlib import Path

from tests.tiny import ROOT, job, settings

DEMO = ROOT / "jobs/configs/demo.yaml"


def test_a_run_ends_done_with_exports_scores_and_curves(finished: Path) -> None:
    state = json.loads((finished / "state.json").read_text())
    assert (state["status"], state["life"], state["stage"]) == ("DONE", 1, "evaluation")
    for stage in ("autoencoder", "diffusion"):
        assert list((finished / "exports" / stage).glob("*.safetensors"))
        assert list((finished / "tensorboard" / stage).glob("events*"))
    (report,) = (finished / "evaluation").glob("test-*.json")
    scores = json.loads(report.read_text())["scores"]
    assert {"model", "oracle", "mimic", "wrong speaker"} <= scores.keys()


def test_a_finished_run_says_so_and_ends(finished: Path, shards: Path) -> None:
    store = finished.parent.parent
    done = job("train", "--config", DEMO, "run.name=tiny", *settings(shards, store))
    assert "stage autoencoder is done" in done.stdout and "from random listener (0 %) to oracle (100 %): model" in done.stdout


def test_a_run_name_with_another_identity_is_refused_with_the_differing_field(finished: Path, shards: Path) -> None:
    before = sorted(path.name for path in (finished / "lives").iterdir())
    done = job("train", "--config", DEMO, "run.name=tiny", *settings(shards, finished.parent.parent), "model.hidden=64", check=False)
    assert done.returncode == 1
    assert "run tiny exists with another identity; differing: model.hidden (was 32, now 64)" in done.stderr
    assert sorted(path.name for path in (finished / "lives").iterdir()) == before


def test_a_shorter_end_is_refused(finished: Path, shards: Path) -> None:
    done = job("train", "--config", DEMO, "run.name=tiny", *settings(shards, finished.parent.parent), "optim.epochs=0.5", check=False)
    assert done.returncode == 1 and "the end of a run may only grow" in done.stderr


def test_a_longer_autoencoder_under_a_trained_diffusion_is_refused(finished: Path, shards: Path) -> None:
    here = [*settings(shards, finished.parent.parent), "optim.epochs=2"]
    done = job("train", "--config", DEMO, "run.name=tiny", *here, check=False)
    assert done.returncode == 1 and "grow optim.epochs.diffusion alone" in done.stderr


def test_a_wrong_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    done = job("train", "optim.learnrate=1", check=False, cwd=tmp_path)
    assert done.returncode == 1 and "there is no key optim.learnrate" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_missing_dataset_names_url_key_and_the_command_that_makes_one(tmp_path: Path) -> None:
    done = job("train", "--config", DEMO, f"data.url={tmp_path}/none", f"run.store={tmp_path}/store", check=False)
    assert done.returncode == 1
    assert f"no dataset at {tmp_path}/none" in done.stderr and "jobs/prepare.py react2024" in done.stderr and "data.url" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_dry_run_prints_the_plan_and_starts_nothing(shards: Path, tmp_path: Path) -> None:
    done = job("train", "--config", DEMO, "--dry-run", *settings(shards, tmp_path / "store"), "workers.count=3", "workers.zero=3")
    for said in ("parameters of encoder", "1 epochs x 40 items / 6 = 7", "6 / 3 ranks = 2", "ZeRO-3", "tensor au", "3 CPUs, 0 GPUs"):
        assert said in done.stdout, said
    assert not (tmp_path / "store").exists()


def test_help_teaches_every_key() -> None:
    text = job("train", "--help").stdout
    assert "optim.lr" in text and "Peak learning rate" in text and "--dry-run" in text
