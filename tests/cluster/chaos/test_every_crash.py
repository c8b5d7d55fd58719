"""The writer is killed before every single operation that writes; the same command ends in what nobody disturbed would have left.

Random kills cannot say "every". A process that dies before a write leaves what was there just then, so each undisturbed program is
run once, with a copy of its store kept before each of its writes (files are linked: they are only ever replaced), and from each copy
the same command goes on.
"""

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.runs import checkpoint
from cluster.storage import Store, open_store
from cluster.storage.hashing import assert_content
from cluster.telemetry.metrics_log import read_rows, validation_name
from tests.cluster.support.one_process import one_process
from tests.cluster.support.writes import watch_writes
from tests.tiny import ROOT, call, job, make_shards, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("default"),  # DeepSpeed's: ranks have processes of their own elsewhere, where they are no errors
]

STAGES = ("autoencoder", "diffusion")

TINY = (
    "workers.count=1",
    "optim.batch=4",
    "run.checkpoint_every=4",
    "run.keep=1",
    "run.checkpoint_minutes=0",
    "evaluation.baselines=false",
)
"""Several checkpoints of each stage, so that old ones are deleted; none by the clock."""

WHO = re.compile(
    r"((runs|sweeps|registry)/[^/]+/)?"
    r"(probes/|lease\.json|lives/|lineage/|logs/|books/|receipt|report|metrics/|checkpoints/|tensorboard/|ray/)"
)
"""What says who did the work, how often and when: not what the work is. Rows, checkpoints and curves are compared by `_of_run`."""


class Undisturbed:
    """A program that came to its end, and its store before each of its writes.

    Args:
        folder: of the program, with the store as it was before in `store`.
        command: a job and its arguments.

    Attributes:
        writes: its operations that write, in order.
        end: what it left.
    """

    def __init__(self, folder: Path, *command: str):
        self.folder, self.command, self.store = folder, command, folder / "store"
        self.writes: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            watch_writes(self._keep, patch.setattr)
            self.said = call(*command).stdout
        self._keep("the end")
        self.end = left(self.store)

    def differing(self, point: int) -> list[str]:
        """Kill the program before this write and give its command again; what of its store ends otherwise than it should."""
        shutil.rmtree(self.store)
        _link(self._before(point), self.store)
        again = call(*self.command, check=False)
        if again.returncode:
            return [f"exit code {again.returncode}: {again.stderr}"]
        end = left(self.store)
        return sorted(key for key in end.keys() | self.end.keys() if end.get(key) != self.end.get(key))

    @property
    def points(self) -> list[int]:
        """One point of each state there was: after a create that finds the object there already, say, there is no new one."""
        files = [self._files(point) for point in range(len(self.writes))]
        return [point for point in range(len(files)) if not point or files[point] != files[point - 1]]

    def _keep(self, what: str) -> None:
        _link(self.store, self._before(len(self.writes)))
        self.writes.append(what)

    def _before(self, point: int) -> Path:
        return self.folder / "before" / str(point)

    def _files(self, point: int) -> set[tuple[Path, int]]:
        before = self._before(point)
        return {(path.relative_to(before), path.stat().st_ino) for path in before.rglob("*") if path.is_file()}


def _link(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    if source.exists():
        shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)


def left(store: Path) -> dict[str, Any]:
    """What counts of a store, by key, without life numbers and times.

    How far a trial has come when it hears that it is stopped is a matter of time: of its run, what it measured and how it ended.
    """
    home = open_store(str(store))
    stopped = _stopped(home)
    found: dict[str, Any] = {}
    for entry in home.list():
        run, _, what = entry.key.removeprefix("runs/").partition("/")
        late = entry.key.startswith("runs/") and run in stopped and not what.startswith(("rungs/", "state.json", "config.yaml"))
        if not WHO.match(entry.key) and not late:
            found[entry.key] = _plain(entry.key, home.read(entry.key))
    for run in sorted({entry.key.split("/")[1] for entry in home.list("runs/")} - stopped):
        found |= {f"runs/{run}: {what}": value for what, value in _of_run(home.at(f"runs/{run}")).items()}
    return found


def _stopped(home: Store) -> set[str]:
    """Runs of the trials that a sweep has stopped."""
    keys = [entry.key for entry in home.list("sweeps/") if "/choice-" in entry.key and not json.loads(home.read(entry.key))["goes_on"]]
    return {json.loads(home.read(f"{key.rpartition('/')[0]}/trial.json"))["run"] for key in keys}


def _plain(key: str, data: bytes) -> Any:
    if key.endswith("/config.yaml"):
        return data.partition(b"\n")[2]  # the life that wrote it
    if key.endswith("/state.json"):
        return {**json.loads(data), "life": None}
    if "/decisions/" in key:
        return {**json.loads(data), "at": None}
    return data


def _of_run(run: Store) -> dict[str, Any]:
    """A run's rows, the ledger among them, the checkpoint a longer run would go on from, and whether it has curves."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for rows in (stage, validation_name(stage)):
            found[f"rows of {rows}"] = [{**row, "life": None} for row in read_rows(run, rows)]
            found[f"curves of {rows}"] = len(list(run.list(f"tensorboard/{rows}/")))
        if names := checkpoint.list_checkpoints(run, stage):
            newest = checkpoint.read_manifest(run, names[0])
            for part in newest.parts:
                assert_content(run, f"checkpoints/{stage}/{part.file}", part.hash)
            facts = {**asdict(newest), "life": None, "attempt": None, "parts": [part.hash for part in newest.parts]}
            found[f"checkpoint of {stage}"] = facts
    return found


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """This process is all there is."""
    with one_process():
        yield


@pytest.fixture(scope="module")
def programs(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """The programs by name, each run when it is first asked for."""
    made: dict[str, Undisturbed] = {}

    def program(name: str) -> Undisturbed:
        if name not in made:
            made[name] = PROGRAMS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return program


def run(folder: Path) -> Undisturbed:
    make_shards(folder, "train=4", "val=2", "test=2", per_shard=2)
    return Undisturbed(folder, "train", *settings(folder / "shards", folder / "store"), *TINY, "run.name=tiny", "evaluation.watch=1")


def two_trials(folder: Path) -> Undisturbed:
    make_shards(folder, "train=4", "val=2", per_shard=4)
    (folder / "sweep.yaml").write_text("name: two\nspace: {diffusion.schedule: [cosine, linear]}\nmetrics: {FRDist: min}")
    return Undisturbed(folder, "tune", "--config", str(folder / "sweep.yaml"), *settings(folder / "shards", folder / "store"), *TINY)


def halved(folder: Path) -> Undisturbed:
    """Its second trial learns nothing, and is stopped at the rung."""
    make_shards(folder, "train=4", "val=2", per_shard=4)
    (folder / "sweep.yaml").write_text(
        "name: half\nspace: {optim.lr.diffusion: [1.0e-2, 1.0e-9]}\nmetrics: {FRDist: min}\nhalving: {rungs: [4], error: 0.3, clips: 2}"
    )
    command = ("tune", "--config", str(folder / "sweep.yaml"), *settings(folder / "shards", folder / "store"), *TINY, "optim.ema=0")
    sweep = Undisturbed(folder, *command)
    assert "trial 1 is stopped" in sweep.said and "trial 0 is at its end: DONE" in sweep.said, sweep.said
    return sweep


def tick(folder: Path) -> Undisturbed:
    """The second one, on a dataset that has grown, with a rule by which the candidate takes the champion's place."""
    make_shards(folder, "train=2", "gate=2", per_shard=2)
    (folder / "retrain.yaml").write_text("name: faces\nrule: {metric: FRDist, mode: max}")
    command = ("retrain", "--config", str(folder / "retrain.yaml"), *settings(folder / "shards", folder / "store"), *TINY)
    assert "decision 1: promoted" in call(*command).stdout
    make_shards(folder, "train=4", "gate=2", per_shard=2)
    second = Undisturbed(folder, *command)
    assert "decision 2: promoted" in second.said, second.said
    return second


PROGRAMS = {"run": run, "two trials": two_trials, "halved": halved, "tick": tick}


@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_before_any_of_its_writes_a_program_ends_in_the_same_bytes(
    name: str, programs: Callable[[str], Undisturbed], capsys: pytest.CaptureFixture[str]
) -> None:
    program = programs(name)
    wrong = {f"{point}, before {program.writes[point]}": found for point in program.points if (found := program.differing(point))}
    with capsys.disabled():
        print(f"\n{name}: {len(program.writes)} crash points, {len(program.points)} of them of different states")
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.ci
def test_ten_crash_points_of_the_programs(programs: Callable[[str], Undisturbed], capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(int(os.environ.get("REACTDIFF_SEED", "0")))
    there = [(name, point) for name in PROGRAMS for point in programs(name).points]
    wrong = {}
    for name, point in chance.sample(there, 10):
        if found := programs(name).differing(point):
            wrong[f"{name} {point}, before {programs(name).writes[point]}"] = found
    with capsys.disabled():
        print(f"\n10 of {len(there)} crash points of different states, in {', '.join(PROGRAMS)}")
    assert not wrong, json.dumps(wrong, indent=1)


def real(folder: Path, shards: Path, at: int) -> subprocess.CompletedProcess[str]:
    """The run as a user gives it, of which the process dies that is about to do this write; -1: nobody."""
    paths = os.pathsep.join([str(ROOT / "tests/cluster/support/dying"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "DYING_WRITES": str(folder / "writes"), "DYING_AT": str(at)}
    (folder / "writes").unlink(missing_ok=True)
    return job("train", *settings(shards, folder / "store"), *TINY, "run.name=tiny", "evaluation.watch=1", check=False, env=environment)


@pytest.mark.timeout(3 * 3600)
def test_every_tenth_of_the_run_s_writes_kills_a_real_process(alone: None, tmp_path: Path) -> None:
    make_shards(tmp_path, "train=4", "val=2", "test=2", per_shard=2)
    shards, folder = tmp_path / "shards", tmp_path / "run"
    folder.mkdir()
    assert real(folder, shards, at=-1).returncode == 0
    undisturbed, writes = left(folder / "store"), (folder / "writes").read_text().splitlines()
    died = []
    for point in range(0, len(writes), 10):
        shutil.rmtree(folder / "store")
        disturbed = real(folder, shards, at=point)
        what = (folder / "writes").read_text().splitlines()[point].rpartition(" ")[0]
        died.append(f"{point}, before {what}: {'the driver' if disturbed.returncode == 137 else 'another process'}")
        if disturbed.returncode:
            disturbed = real(folder, shards, at=-1)
        assert disturbed.returncode == 0, f"{died[-1]}:\n{disturbed.stderr}"
        end = left(folder / "store")
        assert (sorted(end), end) == (sorted(undisturbed), undisturbed), died[-1]
    assert len({line.rpartition(": ")[2] for line in died}) == 2, died
