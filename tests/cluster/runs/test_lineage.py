"""Which checkpoints count, and that of two drivers, whatever befalls them, no older one leaves anything that a reader would take."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from cluster.runs import checkpoint, checkpoint_writer, inventory
from cluster.runs.checkpoint import Checkpoint
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.lineage import LOOKS, assert_sees, newest_first, open_attempt, written_by
from cluster.runs.state import Attempt, Superseded, open_life, read_state
from cluster.storage import Permanent, Store
from tests.cluster.support.interleaving import EXPORT, World

SEEDS = range(200)


def manifest(progress: int, by: str) -> str:
    return f"checkpoints/autoencoder/{progress:015d}-{by}.json"


def counted(store: Store) -> list[str]:
    """The manifests that count, as `<progress>-<who>`."""
    names = (key.rpartition("/")[2].removesuffix(".json") for key in checkpoint.list_checkpoints(store, "autoencoder"))
    return [f"{int(progress)}-{by}" for progress, by in (name.split("-") for name in names)]


def test_what_an_attempt_finds_when_it_begins_counts_and_what_an_older_one_adds_later_does_not(store: Store) -> None:
    life = open_life(store, {})
    assert open_attempt(store, life) == 0
    store.create(manifest(6, "000001.0"), b"{}")
    assert open_attempt(store, life) == 1
    store.create(manifest(12, "000001.0"), b"{}")  # a rank of the first group wakes
    store.create(manifest(9, "000001.1"), b"{}")
    assert counted(store) == ["9-000001.1", "6-000001.0"]
    assert open_attempt(store, open_life(store, {})) == 0
    store.create(manifest(18, "000001.1"), b"{}")  # and one of the life before
    store.create(manifest(15, "000002.0"), b"{}")
    assert counted(store) == ["15-000002.0", "9-000001.1", "6-000001.0"]
    assert open_attempt(store, 2) == 1 and counted(store) == ["15-000002.0", "9-000001.1", "6-000001.0"]


def test_a_rank_whose_machine_has_another_folder_there_is_refused_before_it_writes_anything(store: Store) -> None:
    waited: list[float] = []
    life = open_life(store, {})
    with pytest.raises(Permanent, match=r"does not see .*/lives/000001\.0\.json.*Mount it there"):
        assert_sees(store, life, 0, waited.append)
    assert len(waited) == LOOKS

    def late(_: float) -> None:
        open_attempt(store, life)

    assert_sees(store, life, 0, late)
    assert_sees(store, life, 0, waited.append)
    assert len(waited) == LOOKS, "what is there is not waited for"


def test_a_life_that_ended_before_its_first_attempt_breaks_no_chain(store: Store) -> None:
    for life in (1, 2, 3):
        assert open_life(store, {}) == life
        if life != 2:
            assert open_attempt(store, life) == 0
            store.create(manifest(6 * life, f"{life:06d}.0"), b"{}")
    assert counted(store) == ["18-000003.0", "6-000001.0"]


def test_a_life_that_is_over_opens_no_attempt(store: Store) -> None:
    open_life(store, {})
    open_life(store, {})
    with pytest.raises(Superseded):
        open_attempt(store, 1)
    assert not list(store.list("lineage/"))


def test_in_a_run_that_an_older_version_wrote_everything_counts_and_is_inherited(store: Store) -> None:
    store.create("lives/000001.json", b"{}")
    store.create("lives/000002.json", b"{}")
    for progress, life in ((6, "000001"), (12, "000001"), (12, "000002")):
        store.create(manifest(progress, life), b"{}")
    assert counted(store) == ["12-000002", "12-000001", "6-000001"]
    open_attempt(store, open_life(store, {}))
    assert counted(store) == ["12-000002", "12-000001", "6-000001"]
    store.create(manifest(18, "000002"), b"{}")  # the older version wakes
    store.create(manifest(15, "000003.0"), b"{}")
    assert counted(store) == ["15-000003.0", "12-000002", "12-000001", "6-000001"]


def test_a_record_of_another_version_is_refused_by_name(store: Store) -> None:
    store.create("lineage/000001.0.json", b'{"version": 7}')
    with pytest.raises(
        ValueError, match=r"lineage/000001\.0\.json has version 7, this program reads version 1: go on with the newer program"
    ):
        checkpoint.list_checkpoints(store, "autoencoder")


def test_keys_say_who_wrote_them_and_the_last_one_written_is_the_newest() -> None:
    assert written_by(manifest(6, "000003.12")) == Attempt(3, 12)
    assert written_by(manifest(6, "000003")) == Attempt(3, 0)
    assert written_by("checkpoints/autoencoder/parts/000003.1-00ff.safetensors") == Attempt(3, 1)
    assert written_by("checkpoints/autoencoder/parts/00ff.safetensors") == written_by("checkpoints/autoencoder/x.json") == Attempt(0, 0)
    written = [manifest(18, "000001"), manifest(6, "000002.9"), manifest(6, "000002.10"), manifest(12, "000002.10")]
    assert newest_first(sorted(written)) == written[::-1]


def worlds() -> Iterator[tuple[int, World]]:
    """What became of each seed's two drivers. Requests in parallel are made one after the other: the scheduler orders them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inventory, "parallel_map", map)
        for seed in SEEDS:
            world = World(seed)
            world.run()
            yield seed, world


def test_200_interleavings_of_two_drivers_leave_nothing_of_an_older_life_that_a_reader_would_take() -> None:
    happened: Counter[str] = Counter()
    for seed, world in worlds():
        assert world.violations == [], f"seed {seed}: {world.faults}"
        state = read_state(world.store)
        assert state and state.status == "DONE" and world.store.exists(EXPORT), f"seed {seed}: {world.faults}"
        happened.update(world.faults)
        happened.update(world.late)
    assert all(happened[what] > 100 for what in ("stopped", "cut off", "killed")), happened
    assert happened["create"] > 3, f"attempts that were over wrote: {happened}"


def test_the_checker_finds_what_a_fence_before_the_create_alone_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(writer: CheckpointWriter, found: Checkpoint, _: None) -> None:
        writer._store.create(f"checkpoints/{found.stage}/{found.file}", json.dumps(asdict(found)).encode())

    prune = checkpoint_writer.prune
    monkeypatch.setattr(CheckpointWriter, "_create", create)
    monkeypatch.setattr(checkpoint_writer, "prune", lambda store, found, keep, superseded: prune(store, found, keep, lambda: None))
    assert any(world.violations for _, world in worlds())


def test_the_checker_finds_what_readers_would_take_who_count_every_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "counting", lambda store, of=None: lambda key: True)
    assert any("is taken for the run's" in text for _, world in worlds() for text in world.violations)
