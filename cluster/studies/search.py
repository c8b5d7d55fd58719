"""Which trial comes next and which go on, from the ledger alone: after a death at any moment the same answers come again.

The searcher is asked for trial n when exactly the trials 0 to n - c are settled and told, c being `concurrent` of the file, however many
others have ended by then. What is told of a trial is the same in every order of arrival, since halving's decisions are.
"""

import math
import time
from collections.abc import Callable, Collection
from functools import cache

from cluster.config.loading import ConfigError
from cluster.config.schema import Experiment
from cluster.driver.pin import pin
from cluster.runs.checkpoint import newest_progress
from cluster.runs.state import read_state
from cluster.studies.first_stage import LOOK_AGAIN, finished
from cluster.studies.halving import choose
from cluster.studies.ledger import TrialRecord
from cluster.studies.searchers import Told, best_of, defined
from cluster.studies.sweep import OpenSweep, Trial
from reactdiff.config import STAGES


class Search:
    """A sweep under way.

    Args:
        opened: the sweep.
        reading: whether nothing is to be entered.
        clock: seconds that only grow; when it is looked whether an autoencoder is trained changes who waits, and nothing else.

    Attributes:
        opened: the same.
        ledger: its records; `refresh` reads what others entered.
        given_up: numbers of trials that failed in a way in which they need not fail again: not to be started any more by this process.
    """

    def __init__(self, opened: OpenSweep, reading: bool = False, clock: Callable[[], float] = time.monotonic):
        self.opened, self.ledger, self.given_up = opened, opened.ledger, set[int]()
        self.trial = cache(self._trial)
        self._exhausted, self._clock = False, clock
        self._trained, self._looked = set[str](), dict[str, float]()
        self.ledger.refresh()
        if not reading:
            self.refresh()

    @property
    def rungs(self) -> int:
        """How many rungs there are."""
        return len(self.opened.sweep.halving.rungs) if self.opened.sweep.halving else 0

    def refresh(self) -> None:
        """Read the ledger, take every decision that is ripe and suggest every trial that can be, and enter both."""
        self.ledger.refresh()
        if halving := self.opened.sweep.halving:
            for choice in choose(halving, {number: record.standing for number, record in self.ledger.trials.items()}):
                self.ledger.enter_choice(choice)
            self.ledger.refresh()  # trials that are settled now are told
        while self._suggest():
            self.ledger.refresh()

    def next(self, running: Collection[int], resting: Collection[int] = ()) -> int | None:
        """The number of a trial to start now, beside these; None if there is none yet, or none any more.

        One whose autoencoder nobody is training just now comes first: others would only wait for it.

        Args:
            running: trials that have a driver.
            resting: trials that are not to be started yet.
        """
        waiting = [number for number in self.unfinished() if number not in {*running, *resting, *self.given_up}]
        if not waiting:
            return None
        training = {first.run.name for number in running if (first := self.trial(number).first) and not self._is_trained(first)}
        order = sorted(waiting, key=lambda number: (self._waits(number, training), number))
        return order[0]

    def unfinished(self) -> list[int]:
        """Numbers of the trials that are not at an end; one that is to stop, and has not heard of it, is among them."""
        return [number for number in sorted(self.ledger.trials) if not self.ledger.trials[number].end]

    def settled(self, number: int) -> bool:
        """Whether nothing that counts of a trial can change any more."""
        return self.ledger.trials[number].standing.settled(self.rungs)

    def unsettled(self) -> list[int]:
        """Numbers of the trials of which something that counts may still change."""
        return [number for number in sorted(self.ledger.trials) if not self.settled(number)]

    def progress(self, number: int) -> int:
        """Items at the newest checkpoints of a trial and of the run whose autoencoder it takes, of all stages together."""
        trial = self.trial(number)
        stores = [self.opened.home.at(f"runs/{one.run.name}") for one in (trial.experiment, trial.first) if one]
        return sum(newest_progress(store, stage) for store in stores for stage in STAGES)

    def give_up(self, number: int) -> str:
        """End a trial that would never come to its end by itself, so that what waits for it goes on; returns what is to be said of it.

        Raises:
            ConfigError: if there is no such trial.
        """
        if (record := self.ledger.trials.get(number)) is None:
            raise ConfigError(
                f"--give-up {number}: sweep {self.opened.sweep.name} has no trial {number}, but {len(self.ledger.trials)} of them, "
                "from 0 on; jobs/tune.py --dry-run lists them"
            )
        if not record.end:
            state = read_state(self.opened.home.at(f"runs/{record.run}"))
            self.ledger.enter_end(number, "FAILED", f"given up by hand: {(state.why or state.status) if state else 'it never began'}")
            self.ledger.refresh()
        return f"trial {number} ({record.run}): {record.end} {record.why}".rstrip()

    def over(self) -> bool:
        """Whether all trials that there will ever be are settled."""
        all_there = len(self.ledger.trials) == self.opened.sweep.most or self._exhausted
        return all_there and all(map(self.settled, self.ledger.trials))

    def candidates(self) -> list[TrialRecord]:
        """The trials that reached their end and were not stopped, in the order of their numbers."""
        records = [self.ledger.trials[number] for number in sorted(self.ledger.trials)]
        return [record for record in records if record.end == "DONE" and record.standing.stopped_at is None]

    def leader(self) -> TrialRecord | None:
        """Of the trials that are settled the one with the best first metric, the first of equals; None if none has a score."""
        metric = self.opened.sweep.first_metric
        there = {one.number: (one.scores or {}).get(metric) for one in self.candidates() if self.settled(one.number)}
        found = best_of(there, self.opened.sweep.metrics[metric])
        return None if found is None else self.ledger.trials[found]

    def best(self) -> TrialRecord | None:
        """The leader, once no other trial may win any more."""
        return self.leader() if self.over() else None

    def _trial(self, number: int) -> Trial:
        return self.opened.trial(number, self.ledger.trials[number].point)

    def _is_trained(self, first: Experiment) -> bool:
        """Whether nobody has to train it any more, as of a look into the store a few seconds ago."""
        name, now = first.run.name, self._clock()
        if name not in self._trained and now - self._looked.get(name, -math.inf) >= LOOK_AGAIN:
            self._looked[name] = now
            if finished(pin(first, name), first):
                self._trained.add(name)
        return name in self._trained

    def _waits(self, number: int, training: Collection[str]) -> bool:
        first = self.trial(number).first
        return first is not None and first.run.name in training

    def _suggest(self) -> bool:
        """Suggest the next trial, if it may be; returns whether it was."""
        number = len(self.ledger.trials)
        if number >= self.opened.sweep.most or self._exhausted or (told := self._told(number)) is None:
            return False
        taken = [self.ledger.trials[lower].point for lower in range(number)]
        if (point := self.opened.suggest(number, told, taken)) is None:
            self._exhausted = True
            return False
        trial = self.opened.trial(number, point)
        self.ledger.enter_trial(number, point, trial.run, trial.bracket)
        return True

    def _told(self, number: int) -> list[Told] | None:
        """What the searcher is told when it is asked for a trial, None while that is not settled."""
        if self.opened.sweep.search != "optuna":
            return []
        lower = range(number - self.opened.sweep.concurrent + 1)
        return list(map(self._outcome, lower)) if all(map(self.settled, lower)) else None

    def _outcome(self, number: int) -> Told:
        record, metrics = self.ledger.trials[number], self.opened.sweep.metrics
        stopped = record.standing.stopped_at
        if stopped is None and (values := defined(record.scores, metrics)):
            return Told(record.point, values)
        counted = [rung for rung in sorted(record.rungs) if stopped is None or rung <= stopped]
        return Told(record.point, None, {record.rungs[rung]["progress"]: record.error(rung) for rung in counted})
