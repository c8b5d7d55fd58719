"""Ray Tune as it is, over trials that only pretend to train: it places what the ledger says, and keeps nothing that we need."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.data.manifest import File, Manifest, Split, StreamEntry, publish
from cluster.driver.interruption import Interruption
from cluster.driver.launch import PAUSES
from cluster.runs.state import Superseded
from cluster.runtime import placement
from cluster.runtime.failures import TABLE, StageFailed
from cluster.runtime.nodes import Node
from cluster.runtime.placement import Gang, wait_for_place
from cluster.runtime.ray_cluster import Resources, resources
from cluster.storage import Permanent, StorageError, open_store
from cluster.studies import tuner
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep
from cluster.studies.trial import ToldToEnd
from cluster.studies.tuner import RESTARTS, ROOM, Show, run_sweep, tune_trials
from tests.cluster.support.sweeps import stopped
from tests.tiny import call

RUNGS = [10, 20]

Report = Callable[[Mapping[str, Any]], None]
Ending = Callable[[], bool | None]


def pretend(opened: OpenSweep, number: int, report: Report, ending: Ending) -> None:
    """A trial whose error is its number, that measures its rungs and waits for what is decided; number 2 fails once, and stays behind."""
    ledger = opened.ledger
    (opened_once := opened.home).put(f"seen/{number}-{time.time_ns()}", b"")
    if number == 2 and len(list(opened_once.list("seen/2-"))) == 1:
        raise StageFailed("diffusion", next(failure for failure in TABLE if failure.name == "lost"), RuntimeError("the machine is gone"))
    for rung, items in enumerate(RUNGS):
        errors = [[number + item / 100 + number * (item % 3) / 1000] for item in range(16)]
        ledger.enter_rung(number, rung, {"progress": items, "levels": [[0.0, 0.0]], "errors": errors})
        report({"trial": number, "rungs": rung + 1})
        if stopped(ledger, number):
            ledger.enter_end(number, "STOPPED", "it is worse")
            return
    ledger.enter_end(number, "DONE", scores={"FRDist": float(number)})


@pytest.fixture
def opened(tmp_path: Path) -> OpenSweep:
    splits = {"train": Split(), "val": Split(appropriateness=File(file="val/matrix.npy", hash="0" * 32))}
    streams = [StreamEntry(name="mfcc", kind="acoustic", width=26)]
    manifest = Manifest(kind="clips", frames=100, streams=streams, targets={}, members=[], splits=splits)
    publish(open_store(f"{tmp_path}/shards"), manifest)
    given: dict[str, Any] = {
        "name": "pretended",
        "space": {"diffusion.schedule": ["cosine", "linear"], "optim.lr.diffusion": {"log_range": [1e-5, 1e-3]}},
        "search": "optuna",
        "trials": 4,
        "concurrent": 1,
        "metrics": {"FRDist": "min"},
        "halving": {"rungs": RUNGS, "clips": 8},
    }
    places = [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store", "model.facial=[]", "model.acoustic=[mfcc]"]
    return OpenSweep(Sweep.model_validate(given), places)


def test_tune_runs_what_the_ledger_says_and_starts_again_what_may_go_on(
    opened: OpenSweep, local_ray: Resources, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuner, "run_trial", pretend)
    shown: list[dict[int, str]] = []
    search = Search(opened)
    (refused := Path(opened.store.url) / "tune").write_text("whoever makes a folder of this name here gets an error")
    assert tune_trials(search, lambda: 2, lambda _, states: shown.append(dict(states)), Interruption(), lambda: None) == {}
    assert {0: "RUNNING"} in shown
    assert search.over() and (best := search.best()) is not None and best.number == 0
    assert [search.ledger.trials[number].end for number in range(4)] == ["DONE", "STOPPED", "STOPPED", "STOPPED"]
    seen = [entry.key.split("/")[1].split("-")[0] for entry in opened.home.list("seen/")]
    assert sorted(seen) == ["0", "1", "2", "2", "3"], "the one whose machine was gone is started once more"
    refused.unlink()
    assert {path.name for path in Path(opened.store.url).iterdir()} == {"ledger"}, "Tune keeps nothing in the store"
    said = "".join(capfd.readouterr())
    assert "detailed results" not in said and "fetch metrics" not in said, "nor does it say where it would"
    choice = json.loads(open_store(search.ledger.url).read("000003/choice-0.json"))
    assert (choice["goes_on"], choice["against"]) == (False, 0)


def searcher_of(
    opened: OpenSweep,
    show: Show = lambda *_: None,
    assert_ours: Callable[[], None] = lambda: None,
    concurrent: Callable[[], int] = lambda: 3,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Search, tuner._LedgerSearcher]:
    """A searcher that Tune does not know of, for random trials without rungs, three at a time."""
    plain = opened.sweep.model_copy(update={"halving": None, "search": "random"})
    search = Search(OpenSweep(plain, opened.overrides))
    return search, tuner._LedgerSearcher(search, concurrent, show, Interruption(), assert_ours, clock)


def only_one(opened: OpenSweep) -> OpenSweep:
    return OpenSweep(opened.sweep.model_copy(update={"trials": 1}), opened.overrides)


def test_a_trial_whose_fault_may_pass_is_started_again_a_few_times_with_pauses(opened: OpenSweep) -> None:
    now = [0.0]
    search, searcher = searcher_of(only_one(opened), clock=lambda: now[0])
    for again, pause in enumerate((0.0, *PAUSES[:RESTARTS])):
        if pause:
            assert searcher.suggest("too early") is None
        now[0] += pause
        assert searcher.suggest(f"{again}") == {"number": 0}
        searcher.on_trial_complete(f"{again}")
    assert searcher.suggest("one more") == "FINISHED" and search.given_up == {0} and searcher.undone[0].code == 75


def test_a_trial_that_rests_lets_others_go_first_and_keeps_no_sweep_that_is_to_end(opened: OpenSweep) -> None:
    search, searcher = searcher_of(opened, clock=lambda: 0.0)
    for name, number in (("a", 0), ("b", 0), ("c", 1)):
        assert searcher.suggest(name) == {"number": number}
        searcher.on_trial_complete(name)
    searcher._interruption.signal = signal.SIGINT
    assert searcher.suggest("d") == "FINISHED" and search.given_up == set()


@pytest.mark.parametrize("of_its_autoencoder", [False, True])
def test_a_trial_that_got_further_each_time_is_started_again_however_often(opened: OpenSweep, of_its_autoencoder: bool) -> None:
    search, searcher = searcher_of(only_one(opened), clock=lambda: 0.0)
    trial = search.trial(0)
    assert trial.first
    folder = f"{trial.first.run.name}/checkpoints/autoencoder" if of_its_autoencoder else f"{trial.run}/checkpoints/diffusion"
    for again in range(1, 3 * RESTARTS):
        assert searcher.suggest(f"{again}") == {"number": 0}, "at once"
        opened.home.put(f"runs/{folder}/{100 * again:015d}-1.{again}.json", b"{}")
        searcher.on_trial_complete(f"{again}")
    assert search.given_up == set()


def test_an_end_that_the_store_kept_from_being_understood_is_counted_once(opened: OpenSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    search, searcher = searcher_of(opened, clock=lambda: 0.0)
    assert [searcher.suggest(name) for name in "abc"] == [{"number": 0}, {"number": 1}, {"number": 2}]
    asked, silent = search.progress, {0, 1}

    def progress(number: int) -> int:
        if number in silent:
            raise StorageError("the store is away")
        return asked(number)

    monkeypatch.setattr(search, "progress", progress)
    searcher.on_trial_complete("a")
    silent.remove(0)
    for _ in range(RESTARTS + 1):
        searcher.on_trial_complete("b")
    silent.clear()
    assert searcher.suggest("d") == {"number": 0} and search.given_up == set()


def test_trials_start_on_machines_that_come_while_a_sweep_goes_on_and_not_while_the_cluster_is_silent(opened: OpenSweep) -> None:
    now, room = [0.0], [1]

    def concurrent() -> int:
        if not room:
            raise RayError("the head is away")
        return room[0]

    search, searcher = searcher_of(opened, concurrent=concurrent, clock=lambda: now[0])
    assert [searcher.suggest(name) for name in "ab"] == [{"number": 0}, None]
    room.clear()
    now[0] += ROOM
    assert searcher.suggest("b") is None and searcher.error is None
    room.append(3)
    assert searcher.suggest("b") is None, "it is not asked all the time"
    now[0] += ROOM
    assert [searcher.suggest(name) for name in "bcd"] == [{"number": 1}, {"number": 2}, None] and len(search.ledger.trials) == 4


def test_no_more_trials_run_at_a_time_than_the_machine_of_their_drivers_has_memory_for(
    opened: OpenSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [Node(f"{one}", f"10.0.0.{one}", f"{one}", {}, {"CPU": 48.0, "GPU": 4.0}, {}) for one in range(9)]
    for module in (tuner, placement):
        monkeypatch.setattr(module, "nodes", lambda: there)
    monkeypatch.setattr(tuner, "connect", lambda **_: None)
    monkeypatch.setattr(tuner, "assert_possible", lambda _: None)
    monkeypatch.setattr(placement, "autoscaler", lambda: None)
    given = opened.sweep.model_copy(update={"search": "random", "trials": 100, "concurrent": 0})
    concurrent = tuner._concurrent(given, opened.corner_trials(), opened, print)
    assert concurrent() == 100, "no machine is for drivers, and ranks of a CPU each have room"
    there.append(Node("drivers", "10.0.0.10", "drivers", {}, {"CPU": 0.0, "driver": 1.0}, {}))
    concurrent = tuner._concurrent(given, opened.corner_trials(), opened, print)
    assert concurrent() == 10
    there.append(Node("more", "10.0.0.11", "more", {}, {"CPU": 0.0, "driver": 2.0}, {}))
    assert concurrent() == 30


def test_a_trial_for_which_a_person_must_act_is_not_started_again(opened: OpenSweep) -> None:
    shown: list[dict[int, str]] = []
    search, searcher = searcher_of(opened, lambda _, states: shown.append(dict(states)))
    assert searcher.suggest("a") == {"number": 0}
    searcher.hear({"trial": 0, "undone": "out of memory", "code": 1})
    searcher.on_trial_complete("a")
    assert shown == [{0: "RUNNING"}, {0: "RUNNING"}, {0: "out of memory"}]
    assert search.given_up == {0} and searcher.suggest("b") == {"number": 1}


def test_a_store_that_is_away_for_a_while_is_asked_again_and_ends_no_trial(opened: OpenSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    search, searcher = searcher_of(opened)
    assert [searcher.suggest(name) for name in "abc"] == [{"number": 0}, {"number": 1}, {"number": 2}]
    search.ledger.enter_end(0, "DONE", scores={"FRDist": 1.0})
    store, away = type(opened.home), StorageError("the store is away")
    with monkeypatch.context() as broken:
        broken.setattr(store, "list", lambda *_: (_ for _ in ()).throw(away))
        searcher.on_trial_complete("a")
        searcher.on_trial_complete("a")
        assert searcher.suggest("d") is None and searcher.error is None, "nobody can know now whether trial 0 is done"
    assert searcher.suggest("d") == {"number": 3}
    with monkeypatch.context() as broken:
        broken.setattr(store, "list", lambda *_: (_ for _ in ()).throw(away))
        for name in "bcd":
            searcher.on_trial_complete(name)
        assert searcher.suggest("e") == "FINISHED" and searcher.error is away and searcher.ending, "the same command goes on"


@pytest.mark.parametrize("error", [Permanent("the ledger says another thing"), Superseded("another process goes on")])
def test_what_ends_the_sweep_is_kept_and_its_trials_are_told_to_leave(opened: OpenSweep, error: Exception) -> None:
    wrong: list[Exception] = []

    def assert_ours() -> None:
        if wrong:
            raise wrong[0]

    _, searcher = searcher_of(opened, assert_ours=assert_ours)
    assert searcher.suggest("a") == {"number": 0} and not searcher.ending
    wrong.append(error)
    assert searcher.suggest("b") is None and searcher.ending and searcher.error is error
    searcher.on_trial_complete("a")
    assert searcher.suggest("b") == "FINISHED" and searcher.error is error


def test_a_mistake_of_the_program_in_a_trial_is_not_given_to_a_supervisor_again(
    opened: OpenSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tuner.tune, "report", told.append)

    def mistaken(*_: object) -> None:
        raise RuntimeError("nobody expected it")

    with pytest.raises(RuntimeError):
        tuner._trial({"number": 3}, opened, None, mistaken)
    assert told == [{"trial": 3, "undone": "nobody expected it", "code": 1}]


def test_a_command_that_gives_trials_up_enters_them_as_failed_and_goes_on_without(
    opened: OpenSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "connect", lambda **_: None)
    monkeypatch.setattr(tuner, "assert_possible", lambda _: None)
    monkeypatch.setattr(tuner, "nodes", list)
    monkeypatch.setattr(tuner, "gangs_at_once", lambda _: 1)
    given = opened.sweep.model_copy(update={"search": "random"})
    (file := tmp_path / "sweep.yaml").write_text(given.model_dump_json(exclude={"halving"}))
    given_up = [word for number in range(4) for word in ("--give-up", str(number))]
    told = call("tune", "--config", file, *opened.overrides, *given_up, check=False)
    assert told.returncode == 1 and "has a defined FRDist" in told.stderr, "nothing is left to run, and nothing is the best"
    assert told.stdout.count("FAILED given up by hand: it never began") >= 4
    wrong = call("tune", "--config", file, *opened.overrides, "--give-up", "9", check=False)
    assert wrong.returncode == 1 and "has no trial 9" in wrong.stderr


def filling(opened: OpenSweep, number: int, report: Report, ending: Ending) -> None:
    """A trial whose ranks need every CPU there is."""
    cpus = int(resources().cpus)
    place = wait_for_place(Gang(cpus, cpus, {"CPU": 1.0}), 60, lambda *_: None)
    opened.ledger.enter_end(number, "DONE", scores={"FRDist": float(len(place))})


def test_ranks_that_fill_the_cluster_find_room_beside_their_trial_s_driver(
    opened: OpenSweep, local_ray: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "run_trial", filling)
    monkeypatch.setattr(tuner, "RESTARTS", 0)
    given = opened.sweep.model_copy(update={"halving": None, "search": "random", "trials": 1})
    search = Search(OpenSweep(given, opened.overrides))
    assert tune_trials(search, lambda: 1, lambda *_: None, Interruption(), lambda: None) == {}
    assert search.ledger.trials[0].scores == {"FRDist": local_ray.cpus}


def patient(opened: OpenSweep, number: int, report: Report, ending: Ending) -> None:
    """A trial that trains until the sweep is told to end; number 1 is killed with its process."""
    opened.home.put(f"seen/{number}", b"")
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not ending():
        time.sleep(0.1)
    raise ToldToEnd(f"trial {number} has a checkpoint")


def test_told_to_end_a_sweep_waits_for_the_checkpoints_of_its_trials_and_starts_no_more(
    opened: OpenSweep, local_ray: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "run_trial", patient)
    monkeypatch.setattr(tuner, "RESTARTS", 0)
    given = opened.sweep.model_copy(update={"halving": None, "search": "random"})
    search, interruption = Search(OpenSweep(given, opened.overrides)), Interruption()

    def show(_: Search, states: dict[int, str]) -> None:
        if 2 in states:  # in the place of the one that was killed
            interruption.signal = signal.SIGINT

    undone = tune_trials(search, lambda: 2, show, interruption, lambda: None)
    assert undone[0] == ("(preempted) ToldToEnd: trial 0 has a checkpoint. What to do: the same command goes on", 75)
    assert undone[1].code == 75 and undone[1].why.startswith("its driver is gone")
    assert sorted(undone) == [0, 1, 2] and [entry.key for entry in opened.home.list("seen/")] == ["seen/0", "seen/1", "seen/2"]


def test_a_driver_whose_sweep_was_taken_over_lets_its_trials_leave_and_says_so(
    opened: OpenSweep, local_ray: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "run_trial", patient)
    given = opened.sweep.model_copy(update={"halving": None, "search": "random"})

    def assert_ours() -> None:
        if opened.home.exists("seen/0"):
            raise Superseded("another process goes on")

    with pytest.raises(Superseded, match="another process goes on"):
        tune_trials(Search(OpenSweep(given, opened.overrides)), lambda: 1, lambda *_: None, Interruption(), assert_ours)
    assert [entry.key for entry in opened.home.list("seen/")] == ["seen/0"]


def test_trials_that_can_never_be_placed_are_an_error_before_any_of_them_is_suggested(opened: OpenSweep, local_ray: Resources) -> None:
    given = opened.sweep.model_copy(update={"halving": None, "search": "random"})
    with pytest.raises(ValueError, match=r"room for \d+ of 640 ranks"):
        run_sweep(given, [*opened.overrides, "workers.count=640"], print, lambda *_: None)
    assert [entry.key for entry in opened.store.list()] == ["lease.json"]
