"""A sweep under Ray Tune, which places and runs the trials; this is the only module that knows it.

Tune asks for trials and tells of results through its searcher and its scheduler; both answer from the ledger, so Tune's own state is
never read: the same command replays the ledger, skips what is settled and goes on with the rest.
"""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Experiment
from cluster.driver.interruption import Interruption
from cluster.driver.launch import PAUSES
from cluster.driver.plan import gang_with_memory
from cluster.driver.ray_train import gang_of
from cluster.runs.environment import command
from cluster.runs.lease import Lease
from cluster.runtime.failures import AGAIN, PERSON, StageFailed, exit_code, failure_of, paragraph
from cluster.runtime.nodes import nodes
from cluster.runtime.placement import Gang, assert_possible, gangs_at_once
from cluster.runtime.poller import Poller
from cluster.runtime.ray_cluster import connect
from cluster.runtime.scratch import scratch_folder
from cluster.storage import Permanent, StorageError
from cluster.studies.best import delete_other_best, write_best
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep, Trial
from cluster.studies.trial import LOOK, run_trial
from cluster.telemetry.repeating import repeating
from reactdiff.stage import Source, stages_over

Show = Callable[[Search, Mapping[int, str]], None]
"""Shows how a sweep stands, with the numbers of running trials and of those that failed, and why."""

log = logging.getLogger(__name__)

DRIVER = "driver"
"""Resource of the machines that drivers are on, where a cluster has some: not on spot machines, and not the head."""

OF_A_TRIAL = 0.1
"""How much of `DRIVER` the driver of a trial takes: with its board and Ray Train's controller it has 0.8 GB, a tenth of a small machine."""

RESTARTS = 3
"""How often a trial is started again whose driver ended by what may pass, without having got further."""

ROOM = 10.0
"""Seconds between two looks for how many trials there is room: machines come while a sweep goes on."""


class Undone(NamedTuple):
    """Why a trial is not done, and what a command ends with that was for it alone."""

    why: str
    code: int


def run_sweep(
    sweep: Sweep, overrides: Sequence[str], say: Callable[[str], None], show: Show, give_up: Sequence[int] = ()
) -> tuple[Search, dict[int, Undone]]:
    """Bring every trial to its end, then write the experiment of the best one, `best.yaml`.

    A trial that fails does not stop the others. Where the fault may pass it is started again, a few times; the same call again goes on
    with it, unless it would fail again.

    Args:
        sweep: what its file says.
        overrides: of the experiment, `key=value`.
        say: shows a line.
        show: shows how it stands, whenever that has changed.
        give_up: numbers of trials that are not to go on: they have failed for good.

    Returns:
        The sweep, and why trials failed that are to go on.

    Raises:
        ConfigError, ValueError: before anything starts.
        NoPlace: if a machine of the cluster had too little memory free for the ranks.
        Held: if another process is at this sweep.
        Superseded: if one has taken it over.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when the trials that ran have written a checkpoint.
    """
    opened = OpenSweep(sweep, overrides)
    opened.check(opened.known_trials(opened.ledger))  # what cannot be run is refused before anything is written
    opened.store.assert_conditional_writes()
    with Lease(opened.store, command(), wait=False) as lease:
        opened = OpenSweep(sweep, overrides)  # whoever held the lease may have pinned the dataset
        opened.ledger.refresh()
        known = opened.known_trials(opened.ledger)
        concurrent = _concurrent(sweep, [*known, *opened.corner_trials()], opened, say)
        opened.pin()
        delete_other_best(opened)
        search = Search(opened)
        for number in give_up:
            say(search.give_up(number))
        search.refresh()  # what waited for them goes on
        there = search.ledger.trials.values()
        done = sum(search.settled(one.number) for one in there)
        say(f"sweep {sweep.name}: {sweep.most} trials, {done} of them done, {concurrent()} at a time, in {opened.store.url}")
        undone = dict[int, Undone]()
        if search.unfinished():
            with Interruption() as interruption:
                undone = tune_trials(search, concurrent, show, interruption, lease.assert_not_taken)
                if interruption.signal:
                    say("told to end: the trials have written checkpoints; the same command goes on from there")
                    interruption.end()
        lease.assert_held()
        search.refresh()
        write_best(search)
        if search.over() and len(search.ledger.trials) < sweep.most:
            say(f"no more than {len(search.ledger.trials)} of {sweep.most} trials: no other point was found that can be tried")
        return search, undone


def _concurrent(sweep: Sweep, trials: Sequence[Trial], opened: OpenSweep, say: Callable[[str], None]) -> Callable[[], int]:
    """Tells how many trials run at a time, now; refuses those that could never be placed."""
    workers = {str(trial.experiment.workers): trial.experiment.workers for trial in trials}.values()
    connect(cpus=max(1, sweep.concurrent) * max(one.least for one in workers))
    shapes: dict[str, Experiment] = {}
    for trial in trials:
        one = trial.experiment
        shapes.setdefault(f"{one.model}{one.workers}{one.optim.precision}{one.diffusion.ema_every > 0}", one)
    source = Source(opened.manifest.stream_specs, opened.manifest.frames)
    for experiment in shapes.values():
        for stage, kind in stages_over(source, experiment.model, experiment.diffusion).items():
            assert_possible(gang_with_memory(experiment, stage, kind))
    gangs = [gang_of(one) for one in workers]
    if DRIVER in (alone := _reserved()):
        gangs.append(Gang(1, 1, alone))

    def room() -> int:
        return min(sweep.most, *map(gangs_at_once, gangs))

    if not sweep.concurrent:
        return room
    if sweep.concurrent < (there := room()):
        say(f"there is room for {there} trials at a time, and the sweep's concurrent is {sweep.concurrent}: the rest stays idle")
    return lambda: sweep.concurrent


def tune_trials(
    search: Search, concurrent: Callable[[], int], show: Show, interruption: Interruption, assert_ours: Callable[[], None]
) -> dict[int, Undone]:
    """Run trials until there are none to start; each driver is a process beside the ranks it starts, and reserves next to nothing.

    Once the process was told to end, or cannot go on, no trial is started, and those that run are asked to leave at their next step with
    a checkpoint.

    Returns:
        Number of each trial that was begun, is not done and is to go on -> why.

    Raises:
        Superseded: from `assert_ours`, when the trials have left.
        StorageError: if the store or the ledger refuses, or does not answer while no trial runs; likewise.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it is heard here
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # of results, which the ledger has
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # or it warns that there are none
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # or it prints at the beginning where its notes are
    searcher = _LedgerSearcher(search, concurrent, show, interruption, assert_ours)
    # Here, for a machine elsewhere may be taken away, and nobody would hear any more.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    notice = _Notice.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def hand_on() -> None:
        if searcher.ending:
            notice.give.remote()

    trainable = tune.with_parameters(_trial, opened=search.opened, notice=notice, drive=run_trial)
    # Tune's own notes, which nobody reads: in the store they would be written by Arrow's client, without our retries.
    with scratch_folder() as notes, repeating(hand_on, LOOK, "interruption"):
        tune.Tuner(
            tune.with_resources(trainable, _reserved()),
            # The searcher says when there are no more: a trial may be started several times.
            tune_config=tune.TuneConfig(num_samples=-1, search_alg=searcher, scheduler=_LedgerScheduler(searcher)),
            run_config=tune.RunConfig(name="tune", storage_path=str(notes), verbose=0),
        ).fit()
    if searcher.error:
        raise searcher.error
    left = search.unfinished()
    return {number: why for number, why in searcher.undone.items() if number in left}


def _reserved() -> dict[str, float]:
    """What Tune reserves for the driver of a trial.

    Where no machine is for drivers it is a byte of memory, for Tune must reserve something, and ranks may fill a cluster to its last CPU
    and GPU. A head without CPUs has memory, too, and may get drivers: where it is all there is, a cluster grows from there.
    """
    return {DRIVER: OF_A_TRIAL} if any(node.total.get(DRIVER) for node in nodes()) else {"cpu": 0, "memory": 1}


@ray.remote(num_cpus=0)
class _Notice:
    """Where trials hear that the sweep was told to end."""

    def __init__(self) -> None:
        self._given = False

    def give(self) -> None:
        """It was told now."""
        self._given = True

    def given(self) -> bool:
        """Whether it was."""
        return self._given


def _trial(config: dict[str, int], opened: OpenSweep, notice: Any, drive: Callable[..., None]) -> None:
    """The driver of one trial, as Tune starts it; why one is not done is told in words, not by a pickled error."""
    number = config["number"]
    ending = Poller(lambda: ray.get(notice.given.remote()), LOOK, RayError)
    try:
        drive(opened, number, tune.report, ending.answer)
    except Exception as error:
        mistake = failure_of(error) is None and not isinstance(error, StageFailed)
        tune.report({"trial": number, "undone": paragraph(error), "code": PERSON if mistake else exit_code(error)})
        if mistake:  # of the program: Tune shows where
            raise


class _LedgerSearcher(Searcher):
    """Answers Tune from the ledger; it has no state to be saved.

    Tune ends all trials where a searcher raises, so nothing that goes wrong here is raised: `error` keeps it, and the sweep ends as if it
    had been told to. While trials run, a store that does not answer is only asked again.

    Args:
        search: the sweep.
        concurrent: tells the most trials at a time; asked every 10 s.
        show: shows how it stands.
        interruption: whether the process was told to end.
        assert_ours: raises once another process has the sweep.
        clock: seconds that only grow.

    Attributes:
        undone: number -> why a trial's driver has ended before the trial.
        error: what went wrong here.
    """

    def __init__(
        self,
        search: Search,
        concurrent: Callable[[], int],
        show: Show,
        interruption: Interruption,
        assert_ours: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self._search, self._concurrent, self._show = search, concurrent, show
        self._interruption, self._assert_ours, self._clock = interruption, assert_ours, clock
        self._most, self._asked = 1, -math.inf
        self._running: dict[str, int] = {}
        self._left, self._unread = list[int](), False
        self._furthest, self._restarts, self._due = dict[int, int](), Counter[int](), dict[int, float]()
        self.undone: dict[int, Undone] = {}
        self.error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps pickles of its own, which nobody reads."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Leave nothing there."""

    @property
    def ending(self) -> bool:
        """Whether no trial is to be started any more, and those that run are to leave."""
        return bool(self._interruption.signal or self.error)

    def suggest(self, trial_id: str) -> Any:
        """The trial to start now."""
        if self._unread:
            self.look()
        number = None
        resting = {number for number, due in self._due.items() if self._clock() < due}
        with self._kept():
            self._assert_ours()
            if not self.ending and not self._unread and len(self._running) < self._at_a_time():
                number = self._search.next(self._running.values(), resting)
        if number is None:
            return None if self._running or (resting and not self.ending) else Searcher.FINISHED
        self._running[trial_id] = number
        self.undone.pop(number, None)
        self.look()
        return {"number": number}

    def _at_a_time(self) -> int:
        """How many trials may run, as of a look a few seconds ago, or before, while the cluster does not answer."""
        if self._clock() - self._asked >= ROOM:
            self._asked = self._clock()
            with suppress(RayError):
                self._most = self._concurrent()
        return self._most

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A trial's driver has ended."""
        if (number := self._running.pop(trial_id, None)) is not None:
            self._left.append(number)
        self.look()

    def hear(self, result: Mapping[str, Any]) -> None:
        """A trial's driver has something to tell."""
        if "undone" in result:
            self.undone[result["trial"]] = Undone(result["undone"], result["code"])
        self.look()

    def look(self) -> None:
        """Take what is ripe, and show how the sweep stands."""
        self._unread = True
        with self._kept():
            self._assert_ours()
            self._search.refresh()
            self._unread = False
            while self._left:
                self._left_undone(self._left[0])
                del self._left[0]
            failed = {number: one.why for number, one in self.undone.items()}
            self._show(self._search, failed | dict.fromkeys(self._running.values(), "RUNNING"))

    def _left_undone(self, number: int) -> None:
        """What follows from the end of a trial's driver, where the trial has not ended."""
        if number not in self._search.unfinished():
            return
        why = self.undone.setdefault(number, Undone("its driver is gone, and said nothing: its machine may be lost", AGAIN))
        if why.code == AGAIN and (progress := self._search.progress(number)) > self._furthest.get(number, 0):
            self._furthest[number], self._restarts[number] = progress, 0
        self._restarts[number] += 1
        if why.code != AGAIN or self._restarts[number] > RESTARTS:
            self._search.given_up.add(number)
        else:
            self._due[number] = self._clock() + PAUSES[self._restarts[number] - 1]

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep what is raised inside, unless it may pass while trials run."""
        try:
            yield
        except Exception as error:
            if isinstance(error, StorageError) and not isinstance(error, Permanent) and self._running:
                self._unread = True
                log.warning("the sweep's ledger is asked again: %s", error)
            else:
                self.error = self.error or error


class _LedgerScheduler(FIFOScheduler):
    """Takes decisions when a trial has something to tell; the trial itself sees in the ledger that it is to end."""

    def __init__(self, searcher: _LedgerSearcher):
        super().__init__()
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as the searcher's."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A trial has entered something in the ledger, or is not done."""
        self._searcher.hear(result)
        return FIFOScheduler.CONTINUE
