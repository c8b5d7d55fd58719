"""Equal weights give the outputs of the authors' own modules."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from reactdiff.clip import WINDOW
from reactdiff.diffusion.sampler import ddim
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.published import autoencoder_sources, denoiser_sources, projector_sources
from tests.reactdiff.model.rule import Case, fixtures

TOLERANCE = 1e-5
CONDITION_TOLERANCE = 1e-4
"""Its norm has groups of two channels: of two that are nearly equal it multiplies rounding by up to 1 / (2 sqrt(1e-5)) = 158.

3.4e-5 were seen on an Intel processor, 1e-5 and less on those of AMD: their libraries add up 1600 products in other orders.
"""

SAMPLE_TOLERANCE = 1e-3
"""The last of 20 DDIM steps divides rounding by sqrt(abar_19), about 1 / 406."""

FIXTURES = [pytest.param(path, id=path.stem, marks=[] if path.stem == "parity_small" else pytest.mark.heavy) for path in fixtures()]
each_fixture = pytest.mark.parametrize("path", FIXTURES)


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.numpy() - theirs).max())


@each_fixture
@torch.no_grad()
def test_stage_1_computes_what_the_authors_modules_compute(path: Path) -> None:
    case = Case(path)
    autoencoder = case.autoencoder()
    case.fill(autoencoder, autoencoder_sources(autoencoder), "stage1")
    latent = autoencoder.encode({stream.name: case.input(stream.name, 1, case.frames, stream.width) for stream in case.streams})
    outputs = {"latent": latent} | autoencoder.decode(latent)
    assert {name: difference(output, case.expected[name]) for name, output in outputs.items()} == pytest.approx(
        dict.fromkeys(outputs, 0), abs=TOLERANCE
    )


@pytest.fixture(scope="module", params=FIXTURES)
def stage_2(request: pytest.FixtureRequest) -> Iterator[tuple[Case, LatentDiffusion]]:
    case = Case(request.param)
    diffusion = case.latent_diffusion()
    case.fill(diffusion.condition, projector_sources({}), "projector")
    case.fill(diffusion.denoiser, denoiser_sources(diffusion.denoiser), "stage2")
    with torch.no_grad():
        yield case, diffusion


def windows(case: Case, name: str) -> torch.Tensor:
    return case.input(name, case.frames // WINDOW, WINDOW, case.latent)


def test_the_condition_is_that_of_the_authors(stage_2: tuple[Case, LatentDiffusion]) -> None:
    case, diffusion = stage_2
    assert difference(diffusion.condition(windows(case, "speaker_latent")), case.expected["condition"]) < CONDITION_TOLERANCE


@pytest.mark.parametrize("time", [0, 7, 19])
def test_the_denoiser_predicts_the_authors_epsilon(stage_2: tuple[Case, LatentDiffusion], time: int) -> None:
    case, diffusion = stage_2
    noise = windows(case, "noise")
    epsilon = diffusion.denoiser(noise, torch.full((len(noise),), time), torch.from_numpy(case.expected["condition"]))
    assert difference(epsilon, case.expected[f"epsilon_t{time}"]) < TOLERANCE


def test_twenty_steps_of_ddim_end_at_the_authors_sample(stage_2: tuple[Case, LatentDiffusion]) -> None:
    """Of the first window, since each is sampled for itself: two take twice the time."""
    case, diffusion = stage_2
    condition, noise = torch.from_numpy(case.expected["condition"][:1]), windows(case, "noise")[:1]

    def predict(noisy: torch.Tensor, time: float) -> torch.Tensor:
        return diffusion.denoiser(noisy, torch.full((len(noisy),), time), condition)

    sample = ddim(diffusion.process, predict, lambda _: noise, 20)
    assert difference(sample, case.expected["ddim20_sample"][:1]) < SAMPLE_TOLERANCE


def test_noisy_latents_and_loss_are_those_of_the_authors(stage_2: tuple[Case, LatentDiffusion]) -> None:
    case, diffusion = stage_2
    latent, noise = windows(case, "speaker_latent"), windows(case, "noise").flip(0)
    times = torch.arange(len(noise)) * 7 % 20
    assert difference(diffusion.process.q_sample(latent, noise, times), case.expected["q_sample"]) < TOLERANCE
    raw = latent.reshape(1, case.frames, case.latent)
    loss = diffusion({"speaker": raw, "listener": raw, "noise": noise[None], "times": times[None]})
    assert difference(loss[0] / 10, case.expected["loss_l1"]) < TOLERANCE
