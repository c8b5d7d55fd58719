"""The error of the predicted x_0 at rungs: of the averaged weights, on one scale for all, and training does not notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.evaluation.rung import LEVELS, RungMeter, read_rung, write_rung
from cluster.evaluation.validation import ValidationClips
from cluster.runs.saved import SavedRun, open_run
from cluster.storage import open_store
from reactdiff.config import Diffusion
from reactdiff.diffusion.prediction import PREDICTIONS
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.schedule import SCHEDULES
from reactdiff.model.latent_diffusion import LatentDiffusion
from tests.cluster.support.one_process import one_process
from tests.tiny import call, make_shards, settings

pytestmark = [
    pytest.mark.starts,
    pytest.mark.filterwarnings("default"),  # DeepSpeed's: ranks have processes of their own elsewhere, where they are no errors
]

MORE = ("workers.count=1", "optim.batch=4", "evaluation.baselines=false", "evaluation.clips=1", "evaluation.split=val", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: measured at rungs, not measured, and one whose end is a rung of the first."""
    folder = tmp_path_factory.mktemp("rungs")
    with one_process():
        make_shards(folder, "train=4", "val=3", per_shard=3, frames=100)
        common = [*settings(folder / "shards", folder / "store"), *MORE]
        call("train", *common, "run.name=measured", "optim.epochs=2", "evaluation.rungs=[4,11]", "evaluation.rung_clips=2")
        call("train", *common, "run.name=plain", "optim.epochs=2")
        call("train", *common, "run.name=short", "optim.epochs={autoencoder: 2, diffusion: 1.5}")
    return folder / "store"


def opened(store: Path, name: str) -> SavedRun:
    return open_run(name, str(store))


def meter(run: SavedRun, gather: Any, rank: int = 0, ranks: int = 1, clips: int = 2) -> RungMeter:
    module = run.model().diffusion
    assert module is not None
    return RungMeter(ValidationClips(run.dataset, run.clips.hash, run.latents()), clips, module, gather, rank, ranks, torch.device("cpu"))


def test_it_is_measured_at_the_first_step_at_or_after_each_rung_and_training_does_not_notice(store: Path) -> None:
    run = opened(store, "measured")
    measured = [read_rung(run.store, rung, 2) for rung in (4, 11)]
    assert [found and found["progress"] for found in measured] == [4, 12]
    assert all(found is not None and np.shape(found["errors"]) == (4, len(LEVELS)) for found in measured)
    assert run.export("diffusion").hash == opened(store, "plain").export("diffusion").hash
    assert read_rung(opened(store, "plain").store, 4, 2) is None


def test_what_is_measured_are_the_averaged_weights_of_that_moment(store: Path) -> None:
    found = read_rung(opened(store, "measured").store, 11, 2)
    assert found is not None
    again = meter(opened(store, "short"), lambda mine: [mine]).measure()
    assert again == {"levels": found["levels"], "errors": found["errors"]}
    assert meter(opened(store, "plain"), lambda mine: [mine]).measure()["errors"] != found["errors"], "of a later moment"


def test_any_number_of_ranks_measures_the_same(store: Path) -> None:
    run, told = opened(store, "plain"), list[Any]()
    for rank in range(3):
        together = meter(run, lambda mine: told.append(mine) or told, rank, 3).measure()
    assert together == meter(run, lambda mine: [mine]).measure()


def test_the_error_is_that_of_the_attributes_and_grows_with_the_noise(store: Path) -> None:
    errors = np.array(meter(opened(store, "plain"), lambda mine: [mine]).measure()["errors"])
    assert (np.diff(errors.mean(0)) < 0).all() and 0 < errors.max() < 1


def test_the_first_measurement_on_so_many_clips_stands(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    for clips, progress in ((1, 4), (1, 5), (2, 6)):
        write_rung(run, 4, clips, progress, {"levels": [], "errors": []})
    assert [found and found["progress"] for found in (read_rung(run, 4, clips) for clips in (1, 2, 3))] == [4, 6, None]


def test_what_an_earlier_release_kept_counts_for_as_many_clips_as_it_has(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    run.put("rungs/000000000000004.json", b'{"progress": 4, "levels": [], "errors": [[1.0], [2.0], [3.0], [4.0]]}')
    assert (found := read_rung(run, 4, 2)) is not None and found["progress"] == 4
    assert read_rung(run, 4, 1) is None and read_rung(run, 4, 4) is None


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_a_denoiser_that_knows_the_answer_has_no_error_whatever_it_predicts(schedule: Any, prediction: Any) -> None:
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    process = Process(diffusion)
    clean, noise = torch.rand(2, 1, 50, 3).double() * 2 - 1, torch.randn(2, 1, 50, 3).double()

    class Knowing(LatentDiffusion):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.process, self.target, self.online, self.chunk = process, 3, False, 50
            self.standardised = self.direct = self.clean_history = False
            self.register_buffer("minimum", torch.full((1, 3), -1.0))
            self.register_buffer("maximum", torch.ones(1, 3))

        def _condition(self, heard: torch.Tensor) -> torch.Tensor:
            return heard

        def _denoise(
            self, noisy: torch.Tensor, times: torch.Tensor, condition: torch.Tensor, past: Any = None, history: Any = None
        ) -> torch.Tensor:
            return process.target(clean, noise, times)

    for level in LEVELS:
        step, used = process.nearest(level)
        assert abs(used - level) == min(abs(float(process.log_snr(torch.tensor(t))) - level) for t in range(diffusion.steps))
        found = Knowing().predict_clean(clean.flatten(1, 2), clean.flatten(1, 2), noise, step)
        assert torch.allclose(found, clean.flatten(1, 2).float(), atol=1e-5)
