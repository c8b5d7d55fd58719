"""What a run refuses before it writes anything, and that one driver at a time is at it."""

import io
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from ray.exceptions import RayError

from cluster.config.loading import ConfigError
from cluster.data.manifest import Manifest, publish
from cluster.driver import run
from cluster.driver.pin import pin
from cluster.driver.run import STEPS, check_run, execute
from cluster.runs import lease
from cluster.runs.lease import LEASE, Held
from cluster.runs.state import Superseded, open_life
from cluster.runtime.failures import LOST, StageFailed, failure_of
from cluster.runtime.ray_cluster import Resources
from cluster.runtime.tasks import TaskLost
from cluster.storage import StorageError, Store, open_store
from cluster.storage.folder import STAGED
from cluster.telemetry.display import Display
from tests.tiny import tiny


@pytest.mark.parametrize(
    "overrides, said",
    [
        ("model.denoiser=transformer model.width=20", r"model\.width is 20.*multiple of 8"),
        ("model.hidden=1023", r"model\.hidden is 1023.*multiple of 4"),
        ("model.latent=18 model.heads=2 model.multipliers=[1,1,2]", r"model\.latent is 18.*multiple of 4"),
        ("model.family=perfrdiff model.online=true model.width=500 model.heads=3", r"model\.width is 500.*multiple of 3"),
        ("model.family=perfrdiff model.online=true model.acoustic=[]", r"model\.acoustic is empty"),
        ("diffusion.autoguidance=2 diffusion.weak_progress=8", r"where training keeps nothing.*keeps nothing\. .*autoguidance=2"),
        ("diffusion.autoguidance=2 diffusion.weak_progress=8 diffusion.ema_every=10", r"ema_every=10 it keeps 12, 24, 30\."),
        ("diffusion.ema_every=10 diffusion.ema_length=0.28", r"ema_length=0\.28: such an average cannot be made of the 4 checkpoints"),
        ("diffusion.other_target=0.3", r"does not say which reactions are appropriate in split train: prepare it anew .*--one-to-many"),
        ("model.facial=[none]", r"names the stream 'none', but the dataset has no facial stream of that name"),
        ("model.init_from=[nobody]", "there is no run at"),
        ("model.init_from=[none.pth] model.multipliers=[1,2,4,8]", "there is no file"),
        (
            "evaluation.split=train",
            "split 'train' has no appropriateness matrix, so it cannot be scored; set evaluation.split to one of test",
        ),
        ("run.autoencoder=nobody", r"run\.autoencoder=nobody cannot be taken"),
    ],
)
def test_what_no_worker_could_build_is_refused_and_nothing_is_written(overrides: str, said: str, shards: Path, tmp_path: Path) -> None:
    experiment = tiny(shards, tmp_path / "store", *overrides.split())
    with pytest.raises(ValueError, match=said):
        check_run(experiment, pin(experiment, "tiny"), STEPS)
    assert not list(open_store(str(tmp_path / "store")).list())


def test_what_is_not_evaluated_needs_no_matrix(shards: Path, tmp_path: Path) -> None:
    experiment = tiny(shards, tmp_path / "store", "evaluation.split=train")
    check_run(experiment, pin(experiment, "tiny"), ["autoencoder"])


def test_ranks_without_items_and_a_rate_that_falls_long_before_the_end_are_said(shards: Path, tmp_path: Path) -> None:
    settings = "workers.count=[2,8] optim.batch.diffusion=8 optim.decay.autoencoder=4 optim.decay.diffusion=40".split()
    experiment = tiny(shards, tmp_path / "store", *settings)
    idle, early = check_run(experiment, pin(experiment, "tiny"), STEPS)
    assert "of 8 ranks (workers.count) 2 have nothing to do in stage autoencoder, whose steps have 6 items: give workers.count=6" in idle
    assert "stage autoencoder has 40 items, and from item 4 on (optim.decay.autoencoder) the learning rate is 1% of its peak" in early
    usual = tiny(shards, tmp_path / "store")
    assert check_run(usual, pin(usual, "tiny"), STEPS) == []


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A dataset without clips: enough to begin on."""
    publish(open_store(str(tmp_path / "clips")), Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits={}))
    return tmp_path / "clips"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any], None]]:
    """What each step does: nothing, until a test says what. No Ray is asked for anything, and nothing is refused."""
    does: dict[str, Callable[[Any], None]] = {step: lambda life: None for step in STEPS}
    monkeypatch.setattr(run, "_DO", does)
    monkeypatch.setattr(run, "check_run", lambda *_: [])
    monkeypatch.setattr(run, "connect", lambda cpus: Resources(8, 0, 1))
    monkeypatch.setattr(run, "assert_visible", lambda *_: None)
    monkeypatch.setattr(run, "assert_possible", lambda *_: None)
    monkeypatch.setattr(run, "driver_risk", lambda: "")
    monkeypatch.setattr(run, "this_job", lambda: ("no session", "no job"))
    monkeypatch.setattr(run, "ended_at", lambda *_: None)
    monkeypatch.setattr(lease, "LOOK", 0.02)
    return does


def start(clips: Path, store: Path, *overrides: str, wait: bool = True, display: Display | None = None) -> None:
    experiment = tiny(clips, store, "run.name=one", *overrides)
    execute(experiment, pin(experiment, "one"), STEPS, display or Display(), wait=wait)


def folder(store: Path) -> Store:
    return open_store(str(store / "runs" / "one"))


def state(store: Path) -> dict[str, Any]:
    return json.loads(folder(store).read("state.json"))


def take_over(run: Store) -> None:
    """What another driver does that finds the lease of this one lapsed."""
    run.put(LEASE, b"{}")
    open_life(run, {})


def lives(store: Path) -> int:
    return len(list(folder(store).list("lives/")))


@pytest.mark.starts  # its life's facts name the revision of git
def test_the_holder_of_the_lease_goes_on_where_one_that_has_lost_it_took_a_number(
    steps: dict[str, Callable[[Any], None]], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had looked at its lease, stood still while that lapsed and another took it, and then opened the newest life."""
    original, opened = run.open_life, []

    def overtaken(store: Store, facts: dict[str, Any]) -> int:
        opened.append(original(store, facts))
        if len(opened) == 1:
            original(store, {})
        return opened[-1]

    monkeypatch.setattr(run, "open_life", overtaken)
    said = io.StringIO()
    start(clips, tmp_path, display=Display(said))
    assert opened == [1, 3] and state(tmp_path)["status"] == "DONE" and state(tmp_path)["life"] == 3
    assert "life 2 of" in said.getvalue() and "but this process holds the lease, and goes on with the next life" in said.getvalue()


class Background(Thread):
    """A driver in a thread, which stands in its first step until it may go on."""

    def __init__(self, steps: dict[str, Callable[[Any], None]], *start: Any):
        super().__init__(daemon=True)
        self.there, self.on, self._start, self.error = Event(), Event(), start, None
        steps["autoencoder"] = self._stand
        self.start()
        assert self.there.wait(60)

    def run(self) -> None:
        try:
            start(*self._start)
        except BaseException as error:
            self.error = error

    def _stand(self, life: Any) -> None:
        self.there.set()
        assert self.on.wait(60)


class Said(Display):
    """What a driver says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.starts
def test_a_second_driver_says_who_is_at_the_run_and_since_when_waits_and_goes_on_when_that_has_ended(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    first, said = Background(steps, clips, tmp_path), Said()
    steps["autoencoder"] = lambda life: None
    second = Thread(target=lambda: start(clips, tmp_path, display=said), daemon=True)
    second.start()
    while not said.lines:
        assert second.is_alive()
    holder = json.loads(folder(tmp_path).read(LEASE))
    assert (
        f"{tmp_path}/runs/one is held by host {holder['process']['host']}, process {holder['process']['pid']}, since {holder['since']}"
        in said.lines[0]
    )
    assert lives(tmp_path) == 1, "it writes nothing before it has the lease"
    first.on.set()
    first.join()
    second.join()
    assert first.error is None and (state(tmp_path)["status"], state(tmp_path)["life"]) == ("DONE", 2)


@pytest.mark.starts
def test_a_second_driver_that_does_not_wait_is_refused_and_leaves_the_first_alone(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    first = Background(steps, clips, tmp_path)
    with pytest.raises(Held, match="is at work there: nothing was begun"):
        start(clips, tmp_path, wait=False)
    assert lives(tmp_path) == 1 and state(tmp_path)["status"] == "RUNNING"
    first.on.set()
    first.join()
    assert first.error is None and state(tmp_path)["status"] == "DONE"


@pytest.mark.starts
def test_of_two_first_starts_with_other_identities_under_one_name_one_wins_and_the_other_is_told_what_differs(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    second = tiny(clips, tmp_path, "run.name=one", "seed=2")
    pinned = pin(second, "one")
    assert pinned.fresh
    first = Background(steps, clips, tmp_path, "seed=1")
    first.on.set()
    with pytest.raises(ConfigError, match=r"run one exists with another identity; differing: seed \(was 1, now 2\)"):
        execute(second, pinned, STEPS, Display())
    first.join()
    assert first.error is None and lives(tmp_path) == 1 and state(tmp_path)["status"] == "DONE"
    assert json.loads(folder(tmp_path).read(LEASE))["released"]


@pytest.mark.starts
@pytest.mark.parametrize("broken", ["Exporter", "target"])
def test_what_fails_after_a_life_has_begun_is_the_run_s_state_and_the_lease_is_free(
    broken: str, clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("cannot listen")

    monkeypatch.setattr(run, "Exporter", fail) if broken == "Exporter" else monkeypatch.setattr(run.Exporter, "write_target", fail)
    with pytest.raises(ValueError, match="cannot listen"):
        start(clips, tmp_path)
    assert (state(tmp_path)["status"], state(tmp_path)["why"]) == ("FAILED", "cannot listen")
    monkeypatch.undo()
    assert json.loads(folder(tmp_path).read(LEASE))["released"]


@pytest.mark.starts
@pytest.mark.parametrize("taken", [False, True])
def test_the_end_of_a_life_removes_what_killed_writers_left_and_of_one_that_was_taken_over_leaves_it(
    taken: bool, clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    half = tmp_path / "runs" / "one" / "checkpoints" / f"{STAGED}killed"

    def work(life: Any) -> None:
        half.parent.mkdir(parents=True)
        half.touch()
        if taken:
            take_over(life.store)

    steps["diffusion"] = work
    with pytest.raises(Superseded) if taken else nullcontext():
        start(clips, tmp_path)
    assert half.exists() == taken and state(tmp_path)["status"] == ("RUNNING" if taken else "DONE")


@pytest.mark.starts
def test_what_fails_is_told_with_its_step_and_class_and_a_mistake_as_it_is(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    def fail(error: Exception) -> str:
        def step(life: Any) -> None:
            raise error

        steps["latents"] = step
        with pytest.raises(type(error) if isinstance(error, KeyError) else StageFailed) as told:
            start(clips, tmp_path)
        return str(told.value)

    assert fail(StorageError("nobody answers")).startswith("stage latents failed (storage): StorageError: nobody answers.")
    assert fail(TaskLost("encode_shard: the worker died", RayError("x"))).startswith("stage latents failed (lost): ")
    assert fail(KeyError("a mistake of ours")) == "'a mistake of ours'"
    assert state(tmp_path)["status"] == "FAILED" and state(tmp_path)["life"] == 3


@pytest.mark.starts
def test_a_driver_that_was_taken_over_stops_and_writes_no_state(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    steps["latents"] = lambda life: take_over(life.store)
    with pytest.raises(Superseded, match=r"life 2 of .* has begun"):
        start(clips, tmp_path)
    assert state(tmp_path)["status"] == "RUNNING" and state(tmp_path)["stage"] == "latents"


@pytest.mark.starts
def test_a_driver_whose_lease_was_taken_stops_before_its_next_step(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]]
) -> None:
    done: list[str] = []

    def lose(life: Any) -> None:
        life.store.put(LEASE, b"{}")
        life.lease.beat()

    steps |= {"autoencoder": lose, "latents": lambda life: done.append("latents")}
    with pytest.raises(Superseded, match=r"lease\.json was taken by another process"):
        start(clips, tmp_path)
    assert not done and folder(tmp_path).read(LEASE) == b"{}"


@pytest.mark.starts
@pytest.mark.parametrize("told", [KeyboardInterrupt(), SystemExit(143), ValueError("a mistake")])
def test_however_a_life_ends_its_last_numbers_say_that_it_is_at_no_step(
    clips: Path, tmp_path: Path, steps: dict[str, Callable[[Any], None]], told: BaseException
) -> None:
    kept: list[Any] = []

    def step(life: Any) -> None:
        kept.append(life.exporter)
        raise told

    steps["autoencoder"] = step
    with pytest.raises(type(told)):
        start(clips, tmp_path)
    (at,) = [metric for metric in kept[0].collect() if metric.name == "reactdiff_at"]
    assert [(sample.labels["stage"], sample.value) for sample in at.samples] == [("autoencoder", 0.0)]


@pytest.mark.starts
@pytest.mark.parametrize("ends", [SystemExit(143), StageFailed("latents", failure_of(MemoryError()) or LOST, MemoryError("no more"))])
def test_a_store_that_cannot_be_told_how_a_run_ended_does_not_hide_it(
    ends: BaseException,
    clips: Path,
    tmp_path: Path,
    steps: dict[str, Callable[[Any], None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise StorageError("nobody answers")

    def step(life: Any) -> None:
        monkeypatch.setattr(run, "update_state", silent)
        raise ends

    steps["latents"] = step
    with pytest.raises(type(ends)) as told:
        start(clips, tmp_path)
    assert told.value is ends and state(tmp_path)["status"] == "RUNNING"
    assert re.search(r"runs/one/state\.json does not say that the run is (STOPPED|FAILED) .*: nobody answers", caplog.text)
