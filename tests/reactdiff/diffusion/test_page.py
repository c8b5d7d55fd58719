"""What docs/diffusion.md shows is what is computed."""

import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from reactdiff.config import Diffusion
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.sampler import SAMPLERS
from reactdiff.diffusion.schedule import SCHEDULES
from reactdiff.plot import schedules_png
from tests.reactdiff.diffusion.mixture import Mixture, quantiles
from tests.reactdiff.diffusion.test_sampler import error
from tests.tiny import ROOT

PAGE = (ROOT / "docs/diffusion.md").read_text()
NARROW = Mixture([1], [0], 0.1)

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def schedule_row(schedule: str) -> str:
    """Log-SNR at u = 0.05, 0.25, 0.5, 0.75, 1; sigma of the first step; how much of a deviation of 0.1 a perfect sample keeps."""
    process = Process(Diffusion(schedule=schedule))
    log_snr = process.log_snr(torch.tensor([0, 4, 9, 14, 19])).tolist()
    _, sigma = process.scales(torch.tensor(0), torch.tensor(0.0))
    kept = NARROW.flow(process, noise := quantiles(500)).std() / (NARROW.deviation * noise.std())
    return (
        f"| `{schedule}` | {' | '.join(f'{value:.2f}'.replace('-0.00', '0.00') for value in log_snr)} | {sigma:.3f} | {100 * kept:.0f} % |"
    )


def sampler_row(schedule: str, sampler: str) -> str:
    """The error in thousandths with 5, 10, 20, 40, 80 steps."""
    process = Process(Diffusion(schedule=schedule))
    errors = [1000 * error(sampler, process, steps) for steps in (5, 10, 20, 40, 80)]
    return f"| `{schedule}` | `{sampler}` | {' | '.join(f'{value:.0f}' if value >= 10 else f'{value:.1f}' for value in errors)} |"


@each_schedule
def test_the_table_of_schedules(schedule: str) -> None:
    assert schedule_row(schedule) in PAGE


def test_what_the_page_says_of_a_thousand_steps() -> None:
    noise = quantiles(500)
    ends = {name: NARROW.flow(Process(Diffusion(schedule=name, steps=1000)), noise) for name in SCHEDULES}
    kept = {name: float(end.std() / (NARROW.deviation * noise.std())) for name, end in ends.items()}
    assert round(kept.pop("sqrt"), 2) == 0.48 and min(kept.values()) > 0.98


@pytest.mark.parametrize("sampler", SAMPLERS)
@each_schedule
def test_the_table_of_samplers(schedule: str, sampler: str) -> None:
    assert sampler_row(schedule, sampler) in PAGE


def test_the_picture_is_the_one_that_is_made() -> None:
    made, shown = schedules_png(20), (ROOT / "docs/schedules.png").read_bytes()
    assert max(len(made), len(shown)) <= 100_000 and "](schedules.png)" in PAGE
    pictures = [imread(io.BytesIO(picture)) for picture in (made, shown)]
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).mean() < 0.0005
    other = imread(io.BytesIO(schedules_png(10)))
    assert np.abs(pictures[0] - other).mean() > 0.001
