"""Averages of weights over training, of a relative length that may be chosen afterwards.

An average of relative length s weighs step t of T by a power of t: its standard deviation in time is s T, so it grows with training. Two
of them are followed while training goes on. What they were at several moments are averages over other stretches of the same training, and
a mixture of these comes close to the average of any other length at any moment (Karras et al., *Analyzing and Improving the Training
Dynamics of Diffusion Models*, 2024, section 3 and appendix C).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

LENGTHS = (0.05, 0.10)
"""Of the two that are followed, relative to training so far."""

LONGEST = 0.28
"""A length above this has no power of its own: all steps alike, from the first on, are 0.289 long."""


def average_kind(length: float) -> str:
    """The name of such an average among what is kept of each weight."""
    return f"average-{length:.2f}"


class Profile(NamedTuple):
    """An average as it was after so many steps."""

    steps: int
    length: float


class Mixture(NamedTuple):
    """How an average is made of others: the weight of each, which sum to 1, and how far its profile is from the one that was wanted.

    The misfit is the norm of the difference of the two profiles over the norm of the wanted one.
    """

    weights: tuple[float, ...]
    misfit: float


@cache
def exponent(length: float) -> float:
    """The power of t by which an average of this relative length weighs step t; the paper's gamma.

    Raises:
        ValueError: for a length outside (0, `LONGEST`].
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"an average of relative length {length} cannot be made: choose one above 0, at most {LONGEST}")
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def decay(length: float, step: int) -> float:
    """What is kept of such an average when step `step` (from 1) enters it; nothing at the first one (equation 4 there)."""
    return (1 - 1 / step) ** (exponent(length) + 1)


def mixture(there: Sequence[Profile], wanted: Profile) -> Mixture:
    """The mixture of averages that are there whose profile is nearest to the one wanted (in the square over time)."""
    basis = [*there, wanted]
    products = np.array([[_product(one, other) for other in basis] for one in basis])
    gram, aim, whole = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    ones = np.ones((len(there), 1))
    equations = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    weights = np.linalg.solve(equations, np.append(aim, 1.0))[:-1]
    square = weights @ gram @ weights - 2 * weights @ aim + whole
    return Mixture(tuple(map(float, weights)), float(np.sqrt(max(square, 0.0) / whole)))


def _product(one: Profile, other: Profile) -> float:
    """Inner product over time of two profiles, each (g + 1) t^g / T^(g + 1) up to its own T."""
    (first, a), (second, b) = (one.steps, exponent(one.length)), (other.steps, exponent(other.length))
    least = min(first, second)
    return (a + 1) * (b + 1) / (a + b + 1) / least * (least / first) ** (a + 1) * (least / second) ** (b + 1)
