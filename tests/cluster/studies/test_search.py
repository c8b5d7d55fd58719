"""A sweep is replayed from its ledger: whoever dies whenever, and in whatever order trials get on, the same is suggested and decided."""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.loading import ConfigError
from cluster.data.manifest import File, Manifest, Split, publish
from cluster.runs.state import State
from cluster.storage import open_store
from cluster.studies import search as search_module
from cluster.studies.search import Search
from cluster.studies.searchers import Told, suggest
from cluster.studies.sweep import OpenSweep, Sweep
from reactdiff.data.keyed import generator
from tests.cluster.support.sweeps import stopped

RUNGS = [10, 20]
ITEMS = 16
SPACE: dict[str, Any] = {
    "diffusion.schedule": {"choice": ["cosine", "linear"]},
    "diffusion.steps": {"choice": [10, 20], "when": {"diffusion.schedule": "cosine"}},
    "optim.lr.diffusion": {"log_range": [1e-5, 1e-3]},
}
GRID = {"diffusion.schedule": ["cosine", "linear"], "diffusion.steps": [10, 20], "diffusion.prediction": ["x0", "v"]}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("places")
    splits = {"train": Split(), "val": Split(appropriateness=File(file="val/matrix.npy", hash="0" * 32))}
    publish(open_store(f"{folder}/shards"), Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits=splits))
    return [f"data.url={folder}/shards"]


def sweep(method: str, **keys: Any) -> Sweep:
    given = {"space": SPACE, "trials": 8} if method != "grid" else {"space": GRID}
    rule = {"rungs": RUNGS, "error": 0.2, "clips": 8}
    return Sweep.model_validate({"name": "tried", "search": method, "metrics": {"FRDist": "min"}, "halving": rule, **given} | keys)


class World:
    """What trials would measure: a function of their points; one of them always fails."""

    def __init__(self, seed: int):
        self.seed = seed

    def errors(self, number: int, rung: int) -> list[list[float]]:
        chance = generator("world", self.seed, number, rung)
        quality = float(generator("quality", self.seed, number).choice([0.0, 0.1, 1.0]))
        return [[1 + clip / ITEMS + quality + 0.05 * float(chance.random())] for clip in range(ITEMS)]

    def score(self, number: int) -> float:
        return float(generator("score", self.seed, number).random())


class Deaths:
    """One process after another is at the sweep; each may die before any of its writes to the ledger."""

    def __init__(self, given: Sweep, places: list[str], store: Path, world: World, order: random.Random, deadly: float):
        self.given, self.overrides, self.world, self.order = given, [*places, f"run.store={store}"], world, order
        self.deadly, self.progress = deadly, dict[int, int]()
        self.started: list[int] = []

    def run(self, concurrent: int) -> Search:
        while True:
            try:
                return self.live(concurrent)
            except InterruptedError:
                continue

    def live(self, concurrent: int) -> Search:
        opened = OpenSweep(self.given, self.overrides)
        self.mine(opened)
        search, running = Search(opened), list[int]()
        while True:
            while len(running) < concurrent and (number := search.next(running)) is not None:
                running.append(number)
                self.started.append(number)
            if not running:
                return search
            number = self.order.choice(running)
            self.advance(opened, number)
            if self.order.random() < 0.6:
                search.refresh()
            if opened.ledger.trials[number].end:
                running.remove(number)
                search.refresh()

    def advance(self, opened: OpenSweep, number: int) -> None:
        """A trial hears that it is to stop, measures its next rung, or comes to its end; what it has measured is not lost."""
        at = self.progress.setdefault(number, 0)
        if stopped(opened.ledger, number) and self.order.random() < 0.5:
            opened.ledger.enter_end(number, "STOPPED")
        elif at < len(RUNGS):
            measured = {"progress": RUNGS[at], "levels": [[0.0, 0.0]], "errors": self.world.errors(number, at)}
            opened.ledger.enter_rung(number, at, measured)
            self.progress[number] += 1
        elif number == 2:
            opened.ledger.enter_end(number, "FAILED", "it is not finite")
        else:
            opened.ledger.enter_end(number, "DONE", scores={"FRDist": self.world.score(number)})
        opened.ledger.refresh()

    def mine(self, opened: OpenSweep) -> None:
        """From here on a write to this ledger may be this process's last moment."""
        enter = opened.ledger._enter

        def entered(*given: Any, **more: Any) -> None:
            if self.order.random() < self.deadly:
                raise InterruptedError
            enter(*given, **more)

        opened.ledger._enter = entered  # type: ignore[method-assign]


def records(store: Path) -> dict[str, bytes]:
    """What the ledger says that must be the same: all but the ends of trials that went on until they heard that they were stopped."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*.json"))}
    stopped = {name.rpartition("/")[0] for name, data in found.items() if "choice" in name and b'"goes_on": false' in data}
    late = [name for name in found if name.rpartition("/")[0] in stopped and ("end" in name or not _counts(name, found))]
    return {name: data for name, data in found.items() if name not in late}


def _counts(name: str, found: dict[str, bytes]) -> bool:
    """Whether a rung of a stopped trial is not after the one at which it was stopped."""
    folder, _, what = name.rpartition("/")
    rung = what.removesuffix(".json").partition("-")[2]
    return "rung" not in what or f"{folder}/choice-{rung}.json" in found


@pytest.mark.parametrize("method", ["grid", "random", "optuna"])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival_and_any_deaths_leave_the_same_ledger(method: str, seed: int, places: list[str], tmp_path: Path) -> None:
    concurrent = {"optuna": 3}.get(method, 0)
    given, world = sweep(method, concurrent=concurrent), World(seed)
    left, best = [], set()
    for again in range(5):
        order = random.Random(f"{seed} {again}")
        store = tmp_path / str(again)
        deaths = Deaths(given, places, store, world, order, deadly=0.15 if again else 0.0)
        search = deaths.run(concurrent or order.randint(1, 5))
        assert search.over() and not search.unfinished()
        left.append(records(store))
        winner = search.best()
        best.add(winner and winner.number)
    assert all(one == left[0] for one in left)
    assert len(best) == 1 and None not in best
    decisions = [data for name, data in left[0].items() if "choice" in name]
    assert any(b'"goes_on": false' in data for data in decisions) and any(b'"goes_on": true' in data for data in decisions)


def test_asked_for_trial_n_optuna_has_been_told_exactly_trials_0_to_n_minus_c(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[Told]] = {}

    def watched(method: Any, space: Any, modes: Any, seed: int, number: int, told: Any, fits: Any) -> Any:
        if method == "optuna":
            asked[number] = told
        return suggest(method, space, modes, seed, number, told, fits)

    monkeypatch.setattr("cluster.studies.sweep.suggest", watched)
    deaths = Deaths(sweep("optuna", concurrent=3), places, tmp_path, World(5), random.Random(1), deadly=0.0)
    search = deaths.run(3)
    assert {number: len(told) for number, told in asked.items()} == {number: max(0, number - 2) for number in range(8)}
    for told in asked.values():
        assert [one.point for one in told] == [search.ledger.trials[number].point for number in range(len(told))]
    kinds = [(one.values is not None, bool(one.errors)) for one in asked[7]]
    assert set(kinds) == {(True, False), (False, True)}, "scores, or errors: of one that was stopped, and of the one that failed"
    assert list(asked[7][2].errors) == RUNGS and search.ledger.trials[2].end == "FAILED"


def test_a_trial_that_was_stopped_is_told_by_the_rungs_that_counted(places: list[str], tmp_path: Path) -> None:
    deaths = Deaths(sweep("optuna", concurrent=1), places, tmp_path, World(0), random.Random(1), deadly=0.0)
    search = deaths.run(1)
    stopped = {number: record for number, record in search.ledger.trials.items() if record.standing.stopped_at is not None}
    for number, record in stopped.items():
        told = search._outcome(number)
        assert told.values is None and list(told.errors) == RUNGS[: (record.standing.stopped_at or 0) + 1]
        assert told.errors[RUNGS[0]] == pytest.approx(np.mean(deaths.world.errors(number, 0)))
    assert stopped


def test_no_settled_trial_is_started_again_and_unfinished_ones_go_on(places: list[str], tmp_path: Path) -> None:
    given = sweep("grid", halving=None)
    overrides = [*places, f"run.store={tmp_path}"]
    first = Search(OpenSweep(given, overrides))
    assert first.next([]) == 0 and first.next([0, 1]) == 2
    first.ledger.enter_end(0, "DONE", scores={"FRDist": 1.0})
    first.ledger.enter_end(1, "FAILED", "not finite")
    second = Search(OpenSweep(given, overrides))
    assert second.unfinished() == [2, 3, 4, 5, 6, 7] and second.next([]) == 2
    second.given_up.add(2)
    assert second.next([]) == 3, "a trial that failed is left to the next command"
    assert second.best() is None, "one may still win"


def test_a_proposal_that_is_no_experiment_or_a_run_already_is_made_anew(places: list[str], tmp_path: Path) -> None:
    """Guidance needs dropout of the condition, and whatever workers.zero is, the same is computed: of eight points three are runs."""
    space = {"diffusion.guidance": [1.0, 2.0], "diffusion.condition_dropout": [0.1, 0.0], "workers.zero": [1, 2]}
    given = sweep("optuna", space=space, concurrent=1, trials=4, halving=None)
    search = Search(OpenSweep(given, [*places, f"run.store={tmp_path}"]))
    for number in range(3):
        search.ledger.enter_end(number, "DONE", scores={"FRDist": 1.0})
        search.refresh()
    points = [(one.point["diffusion.guidance"], one.point["diffusion.condition_dropout"]) for one in search.ledger.trials.values()]
    assert sorted(points) == [(1.0, 0.0), (1.0, 0.1), (2.0, 0.1)] and search.over()


def test_a_trial_whose_autoencoder_nobody_trains_comes_first(places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sweep("grid", space={"model.inter_depth": [1, 2], "diffusion.schedule": ["cosine", "linear"]}, halving=None)
    now, looks = [0.0], list[str]()
    search = Search(OpenSweep(given, [*places, f"run.store={tmp_path}"]), clock=lambda: now[0])
    monkeypatch.setattr(search_module, "finished", lambda _, first: bool(looks.append(first.run.name)))
    assert [search.next([]), search.next([0]), search.next([0]), search.next([0, 2])] == [0, 2, 2, 1]
    assert len(looks) == len(set(looks)) == 2, "the store is not asked at each turn"
    assert search.next(range(4)) is None and len(looks) == 2, "where nothing waits, nothing is asked"
    monkeypatch.setattr(search_module, "finished", lambda *_: True)
    assert search.next([0]) == 2
    now[0] += search_module.LOOK_AGAIN
    assert search.next([0]) == 1


def test_the_best_trial_has_the_most_or_the_least_is_the_first_of_equals_and_was_not_stopped(places: list[str], tmp_path: Path) -> None:
    scores: list[float | None] = [1.0, 3.0, 3.0, None]
    for mode, expected in (("max", 1), ("min", 0)):
        space = {"diffusion.schedule": ["cosine", "linear"], "diffusion.steps": [10, 20]}
        given = sweep("grid", space=space, metrics={"FRCorr": mode}, halving=None)
        search = Search(OpenSweep(given, [*places, f"run.store={tmp_path}/{mode}"]))
        for number, score in enumerate(scores):
            assert search.best() is None and (search.leader() is None) == (number == 0)
            search.ledger.enter_end(number, "DONE", scores={"FRCorr": score})
            search.refresh()
        best = search.best()
        assert best is not None and best.number == expected


def test_a_trial_that_is_given_up_has_failed_for_good_and_what_waited_for_it_goes_on(places: list[str], tmp_path: Path) -> None:
    given = sweep("optuna", concurrent=1, trials=3, halving=None)
    search = Search(OpenSweep(given, [*places, f"run.store={tmp_path}"]))
    run = search.opened.home.at(f"runs/{search.ledger.trials[0].run}")
    run.put("state.json", json.dumps(asdict(State("FAILED", 1, "d", "m", why="stage diffusion failed (out_of_memory)"))).encode())
    search.refresh()
    assert (search.unfinished(), search.unsettled()) == ([0], [0]), "the second is not suggested before the first is told"
    assert search.give_up(0) == f"trial 0 ({search.ledger.trials[0].run}): FAILED given up by hand: stage diffusion failed (out_of_memory)"
    search.refresh()
    assert search.unfinished() == [1] and search.ledger.trials[0].end == "FAILED"
    search.ledger.enter_end(1, "DONE", scores={"FRDist": 1.0})
    search.refresh()
    assert search.give_up(1).endswith("DONE") and search.give_up(2).endswith("FAILED given up by hand: it never began")
    assert search.over() and (best := search.best()) is not None and best.number == 1
    with pytest.raises(ConfigError, match=r"--give-up 7: sweep tried has no trial 7, but 3 of them"):
        search.give_up(7)


def test_a_space_that_is_smaller_than_the_trials_that_are_asked_for_ends_with_it(places: list[str], tmp_path: Path) -> None:
    space = {"diffusion.schedule": ["cosine", "linear"]}
    given = sweep("random", space=space, trials=9, halving=None)
    search = Search(OpenSweep(given, [*places, f"run.store={tmp_path}"]))
    assert len(search.ledger.trials) == 2
    for number in range(2):
        search.ledger.enter_end(number, "DONE", scores={"FRDist": 1.0})
    search.refresh()
    assert search.over()


def test_a_ledger_whose_folder_is_deleted_begins_anew(places: list[str], tmp_path: Path) -> None:
    given = sweep("random", halving=None)
    overrides = [*places, f"run.store={tmp_path}"]
    before = [record.run for record in Search(OpenSweep(given, overrides)).ledger.trials.values()]
    shutil.rmtree(tmp_path / "sweeps")
    assert [record.run for record in Search(OpenSweep(given, overrides)).ledger.trials.values()] == before
