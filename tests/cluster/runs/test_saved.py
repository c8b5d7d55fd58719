"""Opening a run by name, folder or URL, and what is said when that cannot be."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.runs.saved import open_run
from cluster.storage import NotFound


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's store elsewhere; the run's folder in it."""
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    return tmp_path / "store" / "runs" / "tiny"


def test_a_run_is_opened_by_name_folder_or_url_wherever_its_store_is_now(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(run.parent.parent)
    monkeypatch.chdir(run.parent)
    for where in ("tiny", str(run), f"{run}/", "./tiny", f"file://{run}"):
        opened = open_run(where, store)
        assert opened.export("diffusion").progress == 40
        assert opened.experiment.run.name == "tiny" and opened.experiment.run.store.removeprefix("file://") == store
        latents = opened.latents()
        assert latents.store.url.removeprefix("file://").startswith(store) and latents.manifest().kind == "latents"


def test_a_missing_run_is_named_with_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no run at {tmp_path}/runs/none .*jobs/train.py .*run.name=none run.store={tmp_path}"):
        open_run("none", str(tmp_path))
    with pytest.raises(ValueError, match="ends in runs/NAME"):
        open_run("some/folder", str(tmp_path))


def test_an_unfinished_stage_is_named(run: Path) -> None:
    shutil.rmtree(run / "exports" / "diffusion")
    with pytest.raises(NotFound, match=r"no export of stage diffusion: .*jobs/train.py"):
        open_run(str(run), "").model()


def test_a_diffusion_of_another_autoencoder_s_latents_is_refused(run: Path) -> None:
    (file,) = (run / "exports" / "diffusion").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset": "0" * 32}))
    with pytest.raises(ValueError, match=rf"was trained on latents {'0' * 32}, but its newest autoencoder"):
        open_run(str(run), "").model()
