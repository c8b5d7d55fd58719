"""Halving: which trials go on from a rung, by a paired test of their errors, whatever the order in which the rungs are reached.

A decision about a trial is a function of what it and the lower-numbered trials of its bracket measured at that rung, and of nothing else.
Until all of that is known the decision is not ripe, and the trial trains on; what it measures meanwhile at later rungs counts only if it
may go on. So each decision is the same in every order of arrival.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from reactdiff.config import Branch
from reactdiff.data.keyed import generator

EXACT = 12
"""Up to so many clips every choice of signs is counted; above, some of them are drawn."""

FLIPS = 10_000
"""How many, at least."""

WORST = 1e9
"""What the error of a clip counts for that is no finite number."""

ROUNDING = 1e-12
"""Sums of the same numbers in another order may differ by so much of their size."""


class Halving(Branch):
    """When a trial ends before its end."""

    rungs: tuple[int, ...] = Field(min_length=1, description="Items of the last stage after which trials are compared, rising.")
    error: float = Field(0.05, gt=0, lt=0.5, description="Largest probability that a trial is stopped that is as good as those before it.")
    clips: int = Field(16, ge=1, description="Clips of val on which they are compared, the first ones, each in both directions.")

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if list(rungs) != sorted(set(rungs)) or rungs[0] < 1:
            raise ValueError(f"rungs are {list(rungs)}, but rise, and begin above 0")
        return rungs

    def level(self, others: int) -> float:
        """The p-value up to which a trial is stopped at one rung: the error is shared by all rungs and all it is compared with."""
        return self.error / (len(self.rungs) * others)

    def clips_needed(self, trials: int) -> int:
        """The fewest clips on which the last of so many trials could be stopped at all."""
        return math.ceil(-math.log2(self.level(max(1, trials - 1))))


End = Literal["", "DONE", "STOPPED", "FAILED"]


@dataclass
class Standing:
    """What is known of a trial.

    Attributes:
        bracket: trials of one bracket are compared.
        errors: rung -> the error of each clip, (clips,).
        goes_on: rung -> what was decided there.
        end: how it ended; FAILED for good, STOPPED by a decision.
    """

    bracket: str = ""
    errors: dict[int, np.ndarray] = field(default_factory=dict)
    goes_on: dict[int, bool] = field(default_factory=dict)
    end: End = ""

    @property
    def stopped_at(self) -> int | None:
        """The rung at which it was stopped."""
        return next((rung for rung, goes_on in sorted(self.goes_on.items()) if not goes_on), None)

    def settled(self, rungs: int) -> bool:
        """Whether nothing that counts of it can change any more, of so many rungs."""
        ended = bool(self.end) and all(rung in self.goes_on for rung in range(rungs) if rung in self.errors)
        return ended or self.stopped_at is not None

    def reached(self, rung: int) -> bool | None:
        """Whether its errors at a rung count, where every earlier rung is decided for trials above it; None while nobody knows."""
        if any(self.goes_on.get(earlier) is False for earlier in range(rung)):
            return False
        return True if rung in self.errors else False if self.end else None


@dataclass(frozen=True)
class Choice:
    """What is decided about a trial at a rung.

    Attributes:
        trial: its number.
        rung: which.
        goes_on: whether it trains on.
        against: the best of the trials it was compared with, None where there was none.
        p: probability of such a difference, or a larger one, if the two were equally good.
        level: up to which p it is stopped.
        smaller: how many times the variance of the difference is smaller for being paired.
    """

    trial: int
    rung: int
    goes_on: bool
    against: int | None = None
    p: float | None = None
    level: float | None = None
    smaller: float | None = None

    @property
    def why(self) -> str:
        """Why it stops the trial, for people."""
        return f"stopped at rung {self.rung + 1}: trial {self.against} is better, p = {self.p:.2g} (at most {self.level:.2g})"


def choose(halving: Halving, trials: Mapping[int, Standing]) -> list[Choice]:
    """Every decision that is ripe and was not taken, in the order of trials and rungs; they are entered in the standings.

    Args:
        halving: the rule.
        trials: number -> standing, of all trials that there are.
    """
    made = []
    for number in sorted(trials):
        one = trials[number]
        if any(lower not in trials for lower in range(number)):
            break
        peers = [lower for lower in range(number) if trials[lower].bracket == one.bracket]
        for rung in range(len(halving.rungs)):
            if rung in one.goes_on:
                continue
            if (reached := one.reached(rung)) is False:  # it was stopped before, or never measured there
                continue
            known = [trials[lower].reached(rung) for lower in peers]
            if reached is None or None in known:
                break
            others = {lower: trials[lower].errors[rung] for lower, reached in zip(peers, known, strict=True) if reached}
            choice = _choice(halving, number, rung, one.errors[rung], others)
            one.goes_on[rung] = choice.goes_on
            made.append(choice)
    return made


def _choice(halving: Halving, trial: int, rung: int, errors: np.ndarray, others: Mapping[int, np.ndarray]) -> Choice:
    if not others:
        return Choice(trial, rung, True)
    best = min(others, key=lambda lower: (math.fsum(others[lower]), lower))
    level = halving.level(len(others))
    if errors.max() >= WORST > others[best].max():  # one such clip outweighs all others, so no test would find the trial worse
        return Choice(trial, rung, False, best, 0.0, level)
    p = sign_flip(errors - others[best], level)
    return Choice(trial, rung, p > level, best, p, level, variance_ratio(errors, others[best]))


def sign_flip(differences: np.ndarray, level: float) -> float:
    """One-sided p-value of a mean difference above 0, by flipping the signs of the differences (Fisher, 1935).

    Args:
        differences: of each clip, (clips,).
        level: at which it will be judged; so many flips are drawn that p can tell, with a key of its own.
    """
    clips, least = len(differences), differences.sum() - ROUNDING * np.abs(differences).sum()
    if clips <= EXACT:
        signs = 1.0 - 2 * ((np.arange(2**clips)[:, None] >> np.arange(clips)) & 1)
        return float(np.mean(signs @ differences >= least))
    flips = max(FLIPS, math.ceil(20 / level))
    chance, extreme = generator("sign flips", clips), 1  # the signs as they are, too
    for start in range(0, flips, FLIPS):
        signs = 1.0 - 2 * chance.integers(0, 2, (min(FLIPS, flips - start), clips), dtype=np.int8)
        extreme += int(np.sum(signs @ differences >= least))
    return extreme / (flips + 1)


def variance_ratio(one: np.ndarray, other: np.ndarray) -> float | None:
    """How many times larger the variance of the difference of two means were if the clips were not the same; None without any."""
    paired = float(np.var(one - other))
    return float((np.var(one) + np.var(other)) / paired) if paired else None
