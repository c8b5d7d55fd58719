"""The ledger of a sweep: what was suggested, measured, decided and reached, as records that are created once and never change.

It is JSON in the store, an object for each fact, named by what the fact is about. Who comes second with a fact finds it there, so every
process may die at any time, and the order in which facts arrive leaves no trace.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cluster.storage import AlreadyExists, NotFound, Permanent, Store
from cluster.studies.halving import WORST, Choice, End, Standing
from cluster.studies.space import Point

VERSION = 2
"""Of the records; ledgers of another one are other ledgers."""


@dataclass
class TrialRecord:
    """What the ledger holds of a trial.

    Attributes:
        number: of the trial.
        point: where in the space it is.
        run: name of its run.
        bracket: trials of one bracket are compared.
        rungs: number of the rung -> what was measured: `progress`, `levels` of log-SNR as (asked, used), `errors` (items, levels).
        choices: number of the rung -> what was decided there.
        end: how it ended, if it did.
        why: it failed.
        scores: by metric, once it is DONE; None where one is undefined.
    """

    number: int
    point: Point
    run: str
    bracket: str
    rungs: dict[int, dict[str, Any]] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    end: End = ""
    why: str = ""
    scores: dict[str, float | None] | None = None

    @property
    def standing(self) -> Standing:
        """What halving sees of it."""
        errors = {rung: self.of_clips(rung) for rung in self.rungs}
        return Standing(self.bracket, errors, {rung: choice.goes_on for rung, choice in self.choices.items()}, self.end)

    def of_clips(self, rung: int) -> np.ndarray:
        """Of each clip at a rung the mean error over levels and directions, (clips,); the directions of one dyad are no two samples."""
        errors = np.array(self.rungs[rung]["errors"])  # (items, levels), as in `cluster.evaluation.ground_truth`
        return np.nan_to_num(errors.reshape(2, -1, errors.shape[1]).mean((0, 2)), nan=WORST).clip(max=WORST)

    def finite(self, rung: int) -> bool:
        """Whether all its errors at a rung are finite numbers; the mean of others says only that they are not."""
        return bool(self.of_clips(rung).max() < WORST)

    def error(self, rung: int) -> float:
        """Mean error over clips at a rung."""
        return float(self.of_clips(rung).mean())


class Ledger:
    """The records of one sweep.

    Args:
        store: their folder.

    Attributes:
        trials: number -> what is known, as of the last `refresh`.
    """

    def __init__(self, store: Store):
        self._store, self._facts = store, dict[str, Any]()
        self.trials: dict[int, TrialRecord] = {}

    @property
    def url(self) -> str:
        """Where they are."""
        return self._store.url

    @property
    def name(self) -> str:
        """The digest of the question that it answers."""
        return self._store.url.rpartition("/")[2]

    def refresh(self) -> None:
        """Read what was entered since, by whomever."""
        new = [entry.key for entry in self._store.list() if entry.key not in self._facts]
        for key in sorted(new, key=lambda key: (not key.endswith("/trial.json"), key)):  # what else is known of a trial comes after it
            self._facts[key] = json.loads(self._store.read(key))
            self._take(key)

    def suggested(self, number: int) -> TrialRecord:
        """A trial as it was suggested, read from the store: nothing of what came of it.

        Raises:
            NotFound: if it was not.
        """
        return TrialRecord(number, **json.loads(self._store.read(f"{number:06d}/trial.json")))

    def enter_trial(self, number: int, point: Point, run: str, bracket: str) -> None:
        """A trial was suggested.

        Raises:
            Permanent: if another one has its number.
        """
        self._enter(f"{number:06d}/trial", {"point": point, "run": run, "bracket": bracket})

    def enter_rung(self, number: int, rung: int, measured: Mapping[str, Any]) -> None:
        """A trial has measured its errors at a rung; the first measurement stands."""
        self._enter(f"{number:06d}/rung-{rung}", measured, first_stands=True)

    def enter_choice(self, choice: Choice) -> None:
        """It was decided whether a trial goes on.

        Raises:
            Permanent: if something else was.
        """
        self._enter(f"{choice.trial:06d}/choice-{choice.rung}", asdict(choice))

    def enter_end(self, number: int, end: End, why: str = "", scores: Mapping[str, float | None] | None = None) -> None:
        """A trial is at its end, or has failed in a way in which it would fail again; the first end stands."""
        self._enter(f"{number:06d}/end", {"end": end, "why": why, "scores": scores and dict(scores)}, first_stands=True)

    def decided(self, number: int, rung: int) -> Choice | None:
        """What was decided about a trial at a rung, looked for in the store; None while nothing was."""
        try:
            return Choice(**json.loads(self._store.read(f"{number:06d}/choice-{rung}.json")))
        except NotFound:
            return None

    def _enter(self, name: str, facts: Mapping[str, Any], first_stands: bool = False) -> None:
        key, data = f"{name}.json", json.dumps(facts, indent=1).encode()
        try:
            self._store.create(key, data)
        except AlreadyExists:
            if not first_stands and (there := self._store.read(key)) != data:
                raise Permanent(
                    f"{self._store.url}/{key} says {there.decode()}, but now it would say {data.decode()}: a sweep must find again what it "
                    "found before. Another version of this program or of Optuna wrote it: go on with that one, or name the sweep anew"
                ) from None

    def _take(self, key: str) -> None:
        trial, _, what = key.removesuffix(".json").partition("/")
        number, (kind, _, rung), facts = int(trial), what.partition("-"), self._facts[key]
        if kind == "trial":
            self.trials[number] = TrialRecord(number, **facts)
        elif kind == "rung":
            self.trials[number].rungs[int(rung)] = facts
        elif kind == "choice":
            self.trials[number].choices[int(rung)] = Choice(**facts)
        else:
            self.trials[number].end, self.trials[number].why, self.trials[number].scores = facts["end"], facts["why"], facts["scores"]
