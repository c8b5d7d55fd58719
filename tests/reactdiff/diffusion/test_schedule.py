import numpy as np
import pytest

from reactdiff.config import Diffusion
from reactdiff.diffusion.schedule import SCHEDULES, schedule

COSINE_20 = """.992007 .972093 .940739 .898706 .847012 .786911 .719858 .647478 .571527 .493844
    .416312 .340810 .269168 .203121 .144272 .094046 .053659 .024092 .006060 .000006"""


def test_cosine_is_the_published_table() -> None:
    abar = schedule(Diffusion(schedule="cosine", steps=20)).abar
    assert [f"{value:.6f}"[1:] for value in abar] == COSINE_20.split()
    assert 1 / np.sqrt(abar[19]) == pytest.approx(406, abs=1)


def test_linear_at_a_thousand_steps_is_ddpm() -> None:
    abar = schedule(Diffusion(schedule="linear", steps=1000)).abar
    betas = 1 - abar / np.concatenate([[1], abar[:-1]])
    assert betas[[0, 999]] == pytest.approx([1e-4, 0.02]) and np.diff(betas) == pytest.approx(np.full(999, 0.0199 / 999), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20, 250])
def test_every_schedule_falls_from_clean_to_noise(name: str, steps: int) -> None:
    abar = schedule(Diffusion(schedule=name, steps=steps, sampling_steps=10)).abar
    assert abar.shape == (steps,) and abar.dtype == np.float64
    assert (np.diff(abar) < 0).all() and (abar > 0).all() and (abar < 1).all() and abar[-1] < 1e-3
