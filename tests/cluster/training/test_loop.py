"""The loop: the same order for every placement, identical weights after any kill, steps and checkpoints whole or not at all."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.data.quarantine import BadItem
from cluster.data.reader import Reader
from cluster.data.stream import Batch
from cluster.runs import checkpoint, state
from cluster.runs.state import Superseded
from cluster.storage import open_store
from cluster.storage.folder import FolderStore
from cluster.telemetry.meter import ENDED, Snapshot
from cluster.training import loop
from cluster.training.agreement import Verdict
from cluster.training.gradient import NonFinite
from reactdiff.data.order import Order
from tests.cluster.support.poison import Dose, poisoned_items
from tests.cluster.support.ranks import on_ranks, start_ranks
from tests.cluster.support.training import parts, train_here, train_on
from tests.tiny import tiny

TOLERANCE = 1e-5
"""Design's word for the first 20 steps from a common state at lr <= 1e-4 without dropout."""


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 13 steps on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_on(1, tiny(shards, folder, "optim.epochs=2", "workers.zero=0"), folder)
    return folder


def rows_of(folder: Path) -> list[dict]:
    from cluster.telemetry.metrics_log import read_rows

    return read_rows(open_store(str(folder)), "autoencoder")


@pytest.mark.parametrize(("ranks", "zero", "micro_batch"), [(2, 1, 2), (3, 3, 0), (2, 2, 0), pytest.param(3, 0, 1, marks=pytest.mark.slow)])
def test_any_ranks_and_zero_stage_use_the_same_items_and_give_the_same_losses(
    undisturbed: Path, shards: Path, tmp_path: Path, ranks: int, zero: int, micro_batch: int
) -> None:
    experiment = tiny(shards, tmp_path, "optim.epochs=2", f"workers.zero={zero}", f"workers.micro_batch={micro_batch}")
    rows, expected = train_on(ranks, experiment, tmp_path), rows_of(undisturbed)
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected] and len(rows) == 14
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=TOLERANCE)


def test_every_item_is_consumed_exactly_once_per_epoch(undisturbed: Path, shards: Path) -> None:
    """The ledger is a sum of checksums, so the steps of both epochs add up to twice the sum over all items."""
    from cluster.data.manifest import load_manifest
    from cluster.data.reader import Reader
    from reactdiff.stage import Source, stage
    from tests.tiny import tiny

    store = open_store(str(shards))
    manifest, experiment = load_manifest(store), tiny(shards, undisturbed)
    reader = Reader(store, manifest, "train")
    kind = stage("autoencoder", experiment.model, experiment.diffusion, Source(manifest.stream_specs, manifest.frames))
    once = sum(reader.read(clip, sorted(set(kind.reads(side).values()))).checksum for clip in range(reader.clips) for side in (0, 1))
    assert sum(row["ledger"] for row in rows_of(undisturbed)) == 2 * once


def test_saved_on_three_ranks_with_zero_3_goes_on_on_one_rank_with_zero_1(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    first = tiny(shards, tmp_path, "optim.epochs=0.9", "workers.zero=3")
    train_on(3, first, tmp_path)
    then = tiny(shards, tmp_path, "optim.epochs=2", "workers.zero=1")
    rows, expected = train_on(1, then, tmp_path, life=2), rows_of(undisturbed)
    assert {row["life"] for row in rows} == {1, 2}
    assert [row["ledger"] for row in rows] == [row["ledger"] for row in expected]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=TOLERANCE)


def from_the_first_checkpoint(folder: str, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Losses of this process are what `loss_of` makes of them as soon as there is a checkpoint; grows by one at every step."""
    from cluster.training import loop as worker

    original, store, steps = worker.Engine.forward, open_store(folder), []

    def forward(self, batch, valid):
        loss = original(self, batch, valid)
        steps.append(len(steps))
        return loss_of(loss) if checkpoint.list_checkpoints(store, "autoencoder") else loss

    worker.Engine.forward = forward
    return steps


def murdered(rank: int, ranks: int, experiment, folder: str) -> None:
    """Train; rank 1 gets a SIGKILL in the step after the first checkpoint."""
    if rank == 1:
        from_the_first_checkpoint(folder, lambda loss: os.kill(os.getpid(), signal.SIGKILL))
    train_here(rank, ranks, experiment, folder, 1, "autoencoder")


def test_killed_with_sigkill_and_started_again_the_final_weights_are_identical(shards: Path, tmp_path: Path) -> None:
    settings = ("optim.epochs=6", "run.checkpoint_every=18", "workers.zero=2", "run.keep=9")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_on(2, tiny(shards, whole, *settings), whole)
    group = start_ranks(2, murdered, tiny(shards, killed, *settings), str(killed))
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        while not group.join():
            pass
    assert group.processes[1].exitcode == -signal.SIGKILL
    store = open_store(str(killed))
    at_the_kill = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert 0 < at_the_kill.progress < 240, "the kill came in the middle"
    train_on(2, tiny(shards, killed, *settings), killed, life=2)
    assert parts(killed) == parts(whole)


def succeeded(rank: int, ranks: int, experiment: Experiment, folder: str) -> int:
    """Train, with a newer life from step 3 on; the step in which a rank learnt of it."""
    state.SUCCESSOR = 0.0
    original, steps = loop._Training.stepped, [0]

    def stepped(self: loop._Training, batch: Batch, verdict: Verdict) -> bool:
        steps[0] = batch.step
        if batch.step == 3 and rank == 0:
            self.job.run.create("lives/000002.json", b"{}")
        time.sleep(0.01)  # in which the store answers
        return original(self, batch, verdict)

    loop._Training.stepped = stepped  # type: ignore[method-assign]
    try:
        train_here(rank, ranks, experiment, folder, 1, "autoencoder")
    except Superseded:
        return steps[0]
    raise AssertionError("it trained to its end")


def test_ranks_whose_driver_stands_still_leave_when_a_newer_life_has_begun(shards: Path, tmp_path: Path) -> None:
    experiment = tiny(shards, tmp_path, "optim.epochs=200", "run.checkpoint_every=1000000")
    (step,) = on_ranks(1, succeeded, experiment, str(tmp_path))
    assert 3 <= step < 300, "of 1333, and no checkpoint told it"


def last_phase(rank: int, ranks: int, experiment: Experiment, folder: str) -> str:
    """What a rank says last that it is at."""
    heard: list[Snapshot] = []
    dataset = open_store(experiment.data.url)
    job = loop.Job(experiment, "autoencoder", open_store(folder), 1, dataset, load_manifest(dataset).hash)
    loop.train(job, loop.Place(rank, ranks, torch.device("cpu")), heard.append)
    return heard[-1]["phase"]


def test_a_rank_says_at_last_that_it_has_ended(shards: Path, tmp_path: Path) -> None:
    assert on_ranks(1, last_phase, tiny(shards, tmp_path), str(tmp_path)) == [ENDED]


def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_run_ends_the_same(shards: Path, tmp_path: Path) -> None:
    settings = ("run.checkpoint_every=12", "run.keep=9")
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    train_on(1, tiny(shards, damaged, "optim.epochs=0.9", *settings), damaged)
    store = open_store(str(damaged))
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    victim = damaged / "checkpoints/autoencoder" / newest.parts[0].file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train_on(1, tiny(shards, damaged, "optim.epochs=1", *settings), damaged, life=2)
    assert "CHECKPOINT DAMAGED, falling back" in (tmp_path / "damaged.log").read_text()
    train_on(1, tiny(shards, whole, "optim.epochs=1", *settings), whole)
    assert parts(damaged) == parts(whole)


def test_a_longer_end_goes_on_as_if_it_had_been_longer_from_the_start(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """40 items are not whole batches of 6: the last step of the short run is not one of the long run."""
    train_on(1, tiny(shards, tmp_path, "optim.epochs=1", "workers.zero=0", "run.keep=1"), tmp_path)
    train_on(1, tiny(shards, tmp_path, "optim.epochs=2", "workers.zero=0"), tmp_path, life=2)
    assert parts(tmp_path) == parts(undisturbed)


def rows_by_thread(rank: int, ranks: int, experiment, folder: str) -> list[bool]:
    """Train; whether each segment of rows was written by the thread that takes the steps."""
    create, by_steps = FolderStore.create, []

    def told(self: FolderStore, key: str, data: bytes) -> str:
        if key.startswith("metrics/"):
            by_steps.append(threading.current_thread() is threading.main_thread())
        return create(self, key, data)

    FolderStore.create = told  # type: ignore[method-assign]
    try:
        train_here(rank, ranks, experiment, folder, 1, "autoencoder")
    finally:
        FolderStore.create = create  # type: ignore[method-assign]
    return by_steps


def test_rows_are_written_beside_the_steps(shards: Path, tmp_path: Path) -> None:
    settings = ("run.checkpoint_every=6", "evaluation.watch=0")
    assert on_ranks(2, rows_by_thread, tiny(shards, tmp_path, *settings), str(tmp_path)) == [[False] * 7, []]


def poisoned(rank: int, ranks: int, experiment, folder: str) -> tuple[str, int]:
    """What is said, and the last step, of training with a loss that becomes NaN on rank 0 after the first checkpoint."""
    steps = from_the_first_checkpoint(folder, lambda loss: loss * (1 if rank else torch.nan))
    try:
        train_here(rank, ranks, experiment, folder, 1, "autoencoder")
    except NonFinite as error:
        return str(error), steps[-1]
    return "finished", steps[-1]


@pytest.mark.parametrize("on_corrupt", ["stop", pytest.param("quarantine", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_through_no_item_of_its_own_stops_all_ranks_before_the_update(
    shards: Path, tmp_path: Path, on_corrupt: str
) -> None:
    settings = ("run.checkpoint_every=6", "optim.epochs=6", f"data.on_corrupt={on_corrupt}")
    said = on_ranks(2, poisoned, tiny(shards, tmp_path, *settings), str(tmp_path))
    (text, step), store = said[0], open_store(str(tmp_path))
    assert said[0] == said[1] and f"step {step} of stage autoencoder was not applied: its loss is nan" in text
    assert "no single item is to blame: each has a finite loss and gradient alone. Lower optim.lr" in text
    newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
    assert 0 < newest.steps <= step < 40 and newest.quarantine == []


DOSES = (Dose(gradient=math.nan), Dose(loss=-math.inf), Dose(gradient=math.inf), Dose(loss=math.nan), Dose(gradient=1e30))
BAD = 8
"""Position, in the second step, of the item that is poisoned: the share of rank 0 of two, alone on one of seven."""


def items_at(experiment: Experiment, positions: range) -> list[int]:
    """The items at these positions of the order."""
    counts, data = load_manifest(open_store(experiment.data.url)).counts("train"), experiment.data
    return Order(2 * counts, experiment.seed, data.block, data.group, data.order).at(np.array(positions)).tolist()


def state_of(training: loop._Training) -> list[bytes]:
    """All that a step changes on this rank."""
    engine = training.engine
    kept = [view.detach().numpy().tobytes() for fragment in engine.fragments() for view in fragment.tensors.values()]
    weights = engine.fill(training.kind.module()).parameters()
    return [*kept, *(p.detach().float().numpy().tobytes() for p in weights), str(training.meter.gauges.get("progress_items")).encode()]


def one_bad_item(rank: int, ranks: int, cases: list[Experiment], folder: str) -> list[tuple[str, bool, int]]:
    """Each case with a poisoned item: `N/stopped` stops at it, `N/without` goes on without it, `N/known` knows it from the start.

    In `none`, all items of a step of the first case are poisoned. Returns what was said, whether the state was that
    before the step, and how many steps were applied before it.
    """
    found, step, average, quarantine = [], loop._Training.step, loop.Engine.average, loop.Quarantine
    for number, experiment in enumerate(cases):
        item, run, states, applied = items_at(experiment, range(BAD, BAD + 1))[0], f"{folder}/{number}", [], []
        Path(run).mkdir(exist_ok=True)

        def watched(self, *arguments, states=states):
            before = state_of(self)
            verdict = step(self, *arguments)
            if not verdict.finite:
                states += [before, state_of(self)]
            return verdict

        def counted(self, done, applied=applied):
            applied.append(done)
            average(self, done)

        stops = experiment.model_copy(update={"data": experiment.data.model_copy(update={"on_corrupt": "stop"})})
        with poisoned_items(experiment, {item: DOSES[number % len(DOSES)]}):
            loop._Training.step, loop.Engine.average = watched, counted
            with pytest.raises(NonFinite) as error:
                train_here(rank, ranks, stops, f"{run}/stopped", 1, "autoencoder")
            assert error.value.items == (item,)
            loop._Training.step, loop.Engine.average = step, average
            found.append((str(error.value), states[0] == states[1], len(applied)))
            train_here(rank, ranks, experiment, f"{run}/without", 1, "autoencoder")
        loop.Quarantine = lambda entries, item=item: quarantine([*entries, BadItem(item, BAD, "known")])
        train_here(rank, ranks, experiment, f"{run}/known", 1, "autoencoder")
        loop.Quarantine = quarantine
    with poisoned_items(cases[0], dict.fromkeys(items_at(cases[0], range(6, 12)), DOSES[0])), pytest.raises(NonFinite) as error:
        train_here(rank, ranks, cases[0], f"{folder}/none", 1, "autoencoder")
    assert "no single item is to blame: with the weights of now, none is finite alone" in str(error.value) and error.value.items == ()
    return found


def case_of(shards: Path, folder: Path, zero: int, precision: str, micro_batch: int, *more: str) -> Experiment:
    """Four steps in which dropout has its part; a checkpoint after each."""
    changes = (f"workers.zero={zero}", f"optim.precision={precision}", f"workers.micro_batch={micro_batch}", "model.dropout=0.1")
    ends = ("optim.epochs=0.6", "run.checkpoint_every=6", "run.keep=9", "data.on_corrupt=quarantine")
    return tiny(shards, folder, *changes, *ends, *more)


EVERY = [(zero, "fp32") for zero in range(4)] + [(zero, "bf16") for zero in (1, 2, 3)]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [(3, "fp32", 0), (2, "bf16", 1)]),
        pytest.param(2, [(*of, micro) for of in EVERY for micro in (0, 1)], marks=pytest.mark.slow),
        pytest.param(7, [(*of, 0) for of in EVERY], marks=pytest.mark.slow),
    ],
)
def test_an_item_that_is_not_finite_by_itself_is_named_or_left_out_as_if_it_had_been_known(
    shards: Path, tmp_path: Path, ranks: int, cases: list[tuple[int, str, int]]
) -> None:
    experiments = [case_of(shards, tmp_path, *of) for of in cases]
    of_ranks, store = on_ranks(ranks, one_bad_item, experiments, str(tmp_path)), open_store(str(shards))
    item = items_at(experiments[0], range(BAD, BAD + 1))[0]
    named = Reader(store, load_manifest(store), "train").named(item // 2)
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks), "all ranks say the same, and none was ahead"
    assert "QUARANTINED" not in (tmp_path / "none.log").read_text()
    for number, (said, unchanged, updates) in enumerate(of_ranks[0]):
        run, dose = tmp_path / str(number), DOSES[number % len(DOSES)]
        why = "its loss is " if dose.loss != 1 else "its gradient has norm "
        blame = f"To blame is item {item} (clip {item // 2}, side {item % 2} of split train of {store.url}; {named}: {why}"
        assert said.count("; shard") == 1 and blame in said and "data.on_corrupt=quarantine" in said, said
        assert unchanged and updates == 1
        assert rows_of(run / "without") == rows_of(run / "known") and len(rows_of(run / "known")) == 4
        assert parts(run / "without") == parts(run / "known")
        listed = [checkpoint.read_manifest(open_store(str(run / "without")), name) for name in names_of(run / "without")]
        assert [[(bad.item, bad.position) for bad in one.quarantine] for one in listed] == [[(item, BAD)]] * 3 + [[]]
        assert re.search(rf"QUARANTINED: item {item} .* from position {BAD} on: {named}: {why}", Path(f"{run}/without.log").read_text())


def names_of(folder: Path | str) -> list[str]:
    """Of the checkpoints of a run, newest first."""
    return checkpoint.list_checkpoints(open_store(str(folder)), "autoencoder")


def not_finite_once(rank: int, ranks: int, experiment: Experiment, item: int, folder: str) -> None:
    """In `whole` an item is not finite until that is found; `before` and `after` go on from a kill before and after that."""
    isolate, doses = loop._Training.isolate, {item: DOSES[0]}

    def mended(self, found):
        isolate(self, found)
        doses.clear()

    loop._Training.isolate = mended
    with poisoned_items(experiment, doses):
        train_here(rank, ranks, experiment, f"{folder}/whole", 1, "autoencoder")
        for name, steps in {"before": 1, "after": 2}.items():
            shutil.copytree(f"{folder}/whole", f"{folder}/{name}")
            for later in names_of(f"{folder}/{name}")[:-steps]:
                os.remove(f"{folder}/{name}/{later}")
        doses[item] = DOSES[0]
        train_here(rank, ranks, experiment, f"{folder}/before", 2, "autoencoder")
        train_here(rank, ranks, experiment, f"{folder}/after", 2, "autoencoder")


def test_a_run_killed_before_or_after_a_bad_item_was_found_ends_identical(shards: Path, tmp_path: Path) -> None:
    """Steps of 15 of 40 items: the item is in step 1, and in step 2 once more, whose batch is there when it is found."""
    experiment = case_of(shards, tmp_path, 2, "fp32", 0, "optim.batch=15", "optim.epochs=2", "run.checkpoint_every=15")
    item = min(set(items_at(experiment, range(15, 30))) & set(items_at(experiment, range(40, 45))))
    on_ranks(1, not_finite_once, experiment, item, str(tmp_path))
    assert parts(tmp_path / "whole") == parts(tmp_path / "before") == parts(tmp_path / "after")
    ledger = [row["ledger"] for row in rows_of(tmp_path / "whole")]
    for name, found in {"before": 1, "after": 0}.items():
        assert {row["life"] for row in rows_of(tmp_path / name)} == {1, 2}
        assert [row["ledger"] for row in rows_of(tmp_path / name)] == ledger
        assert Path(f"{tmp_path}/{name}.log").read_text().count("QUARANTINED") == found


def test_a_checkpoint_comes_by_the_minute_too_and_changes_nothing(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """Rank 0's clock decides for all: ranks that took it at different steps would leave parts without a manifest."""
    found = {}
    for minutes in (0, 1e-5):
        folder = tmp_path / str(minutes)
        settings = ("optim.epochs=2", "run.checkpoint_every=100000", f"run.checkpoint_minutes={minutes}", "run.keep=99")
        rows = train_on(2, tiny(shards, folder, *settings), folder)
        assert [row["ledger"] for row in rows] == [row["ledger"] for row in rows_of(undisturbed)]
        found[minutes] = len(checkpoint.list_checkpoints(open_store(str(folder)), "autoencoder"))
    assert found[0] <= 2 < found[1e-5], "those before a step that is not a whole batch, and at the end, come anyway"


def test_a_checkpoint_without_its_manifest_does_not_exist(undisturbed: Path) -> None:
    store = open_store(str(undisturbed))
    names = checkpoint.list_checkpoints(store, "autoencoder")
    facts = json.loads(store.read(names[0]))
    assert facts["progress"] == 80 and facts["quarantine"] == [] and facts["config"]["model.hidden"] == 32
    assert all(name.endswith(".json") for name in names)
