import math

import numpy as np
import pytest

from reactdiff.diffusion.schedule import SCHEDULES

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
U = np.linspace(0.001, 0.999, 999)


def abar(name: str, u: float) -> float:
    return float(1 / (1 + np.exp(-SCHEDULES[name].log_snr(np.array([u])))[0]))


@each_schedule
def test_log_snr_falls_everywhere(name: str) -> None:
    log_snr = SCHEDULES[name].log_snr(np.append(U, 1))
    assert log_snr.dtype == np.float64 and (np.diff(log_snr) < 0).all()
    assert np.isfinite(log_snr[:-1]).all() and log_snr[-1] < -8


@each_schedule
def test_the_derivative_is_that_of_log_snr(name: str) -> None:
    schedule, h = SCHEDULES[name], 1e-6
    differences = (schedule.log_snr(U + h) - schedule.log_snr(U - h)) / (2 * h)
    inside = U < 0.998  # nearer to the end, log-SNR bends too much for a difference
    assert schedule.derivative(U)[inside] == pytest.approx(differences[inside], rel=1e-5)
    assert (schedule.derivative(np.append(U, 1)) < 0).all()


def test_schedules_have_the_values_of_their_sources() -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for u in (0.05, 0.3, 0.8):
        assert abar("cosine", u) == pytest.approx(f(u) / f(0))
        assert abar("sqrt", u) == pytest.approx(1 - math.sqrt(u + 1e-4))
        assert abar("sigmoid", u) == pytest.approx((sigmoid(3) - sigmoid(6 * u - 3)) / (sigmoid(3) - sigmoid(-3)))
        sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        assert abar("karras", u) == pytest.approx(1 / (1 + sigma**2))
    assert abar("karras", 1) == pytest.approx(1 / 6401)


def test_linear_is_the_limit_of_many_small_betas() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    product = np.cumprod(1 - betas)
    ours = [abar("linear", (step + 1) / 1000) for step in range(1000)]
    assert ours[:800] == pytest.approx(product[:800], rel=0.07)
    assert abar("linear", 1) == pytest.approx(math.exp(-10.05))
