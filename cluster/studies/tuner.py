"""A sweep under Ray Tune, which places and runs the trials; this is the only module that knows it.

Tune asks for trials and tells of results through its searcher and its scheduler; both answer from the ledger, so Tune's own state is
never read: the same command replays the ledger, skips what is settled and goes on with the rest.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cluster.config.schema import Experiment
from cluster.driver.plan import gang_with_memory
from cluster.driver.ray_train import gang_of
from cluster.runs.environment import command
from cluster.runs.lease import Lease
from cluster.runtime.placement import assert_possible, gangs_at_once
from cluster.runtime.ray_cluster import connect
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep, Trial
from cluster.studies.trial import run_trial
from reactdiff.stage import Source, stages_over

Show = Callable[[Search, Mapping[int, str]], None]
"""Shows how a sweep stands, with the numbers of running trials and of those that failed, and why."""


def run_sweep(sweep: Sweep, overrides: Sequence[str], say: Callable[[str], None], show: Show) -> tuple[Search, dict[int, str]]:
    """Bring every trial to its end, then write the experiment of the best one, `best.yaml`.

    A trial that fails does not stop the others; the same call again goes on with it, unless it would fail again.

    Args:
        sweep: what its file says.
        overrides: of the experiment, `key=value`.
        say: shows a line.
        show: shows how it stands, whenever that has changed.

    Returns:
        The sweep, and why trials failed that are to go on.

    Raises:
        ConfigError, ValueError: before anything starts.
        NoPlace: if a machine of the cluster had too little memory free for the ranks.
        Held: if another process is at this sweep.
        Superseded: if one has taken it over.
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
        search = Search(opened)
        there = search.ledger.trials.values()
        done = sum(search.settled(one.number) for one in there)
        say(f"sweep {sweep.name}: {sweep.most} trials, {done} of them done, {concurrent} at a time, in {opened.store.url}")
        errors = tune_trials(search, concurrent, show) if search.unfinished() else {}
        lease.assert_held()
        search.refresh()
        if (winner := search.best()) is not None:
            opened.store.put("best.yaml", opened.winner(winner.point).encode())
        return search, errors


def _concurrent(sweep: Sweep, trials: Sequence[Trial], opened: OpenSweep, say: Callable[[str], None]) -> int:
    """How many trials run at a time; refuses those that could never be placed."""
    workers = {str(trial.experiment.workers): trial.experiment.workers for trial in trials}.values()
    connect(cpus=max(1, sweep.concurrent) * max(one.least for one in workers) + 1)
    shapes: dict[str, Experiment] = {}
    for trial in trials:
        shapes.setdefault(f"{trial.experiment.model}{trial.experiment.workers}{trial.experiment.optim.precision}", trial.experiment)
    source = Source(opened.manifest.stream_specs, opened.manifest.frames)
    for experiment in shapes.values():
        for kind in stages_over(source, experiment.model, experiment.diffusion).values():
            assert_possible(gang_with_memory(experiment, kind))
    room = min(gangs_at_once(gang_of(one)) for one in workers)
    if not sweep.concurrent:
        return min(room, sweep.most)
    if sweep.concurrent < min(room, sweep.most):
        say(f"there is room for {room} trials at a time, and the sweep's concurrent is {sweep.concurrent}: the rest stays idle")
    return sweep.concurrent


def tune_trials(search: Search, concurrent: int, show: Show) -> dict[int, str]:
    """Run trials until there are none to start; each driver is a process beside the ranks it starts, and reserves next to nothing.

    Returns:
        Number of each trial that failed and is to go on -> why.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interruption ends this process, as that of any job does
    searcher = _LedgerSearcher(search, concurrent, show)
    results = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, opened=search.opened), {"cpu": 0.01}),  # a CPU each could leave none for ranks
        tune_config=tune.TuneConfig(num_samples=search.opened.sweep.most, search_alg=searcher, scheduler=_LedgerScheduler(searcher)),
        run_config=tune.RunConfig(name="tune", storage_path=search.opened.store.url, verbose=0),
    ).fit()
    every = [results[number] for number in range(len(results))]
    errors = {one.config["number"]: one.error for one in every if one.config and one.error}
    return {number: str(error).strip().splitlines()[-1] for number, error in errors.items() if number in search.given_up}


def _trial(config: dict[str, int], opened: OpenSweep) -> None:
    """The driver of one trial, as Tune starts it."""
    run_trial(opened, config["number"], tune.report)


class _LedgerSearcher(Searcher):
    """Answers Tune from the ledger; it has no state to be saved."""

    def __init__(self, search: Search, concurrent: int, show: Show):
        super().__init__()
        self._search, self._concurrent, self._show = search, concurrent, show
        self._running: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps pickles of its own, which nobody reads."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Leave nothing there."""

    def suggest(self, trial_id: str) -> Any:
        """The trial to start now."""
        if len(self._running) >= self._concurrent:
            return None
        if (number := self._search.next(self._running.values())) is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = number
        self.look()
        return {"number": number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A trial's driver has ended."""
        number = self._running.pop(trial_id)
        self._search.refresh()
        if number in self._search.unfinished():
            self._search.given_up.add(number)
        self.look()

    def look(self) -> None:
        """Take what is ripe, and show how the sweep stands."""
        self._search.refresh()
        self._show(self._search, dict.fromkeys(self._running.values(), "RUNNING"))


class _LedgerScheduler(FIFOScheduler):
    """Takes decisions when a trial has something to tell; the trial itself sees in the ledger that it is to end."""

    def __init__(self, searcher: _LedgerSearcher):
        super().__init__()
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as the searcher's."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A trial has entered something in the ledger."""
        self._searcher.look()
        return FIFOScheduler.CONTINUE
