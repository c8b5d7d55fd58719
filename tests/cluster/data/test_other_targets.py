"""Whose target an item has: a function of seed and position, always somebody appropriate, and read in its place."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.data.manifest import load_manifest
from cluster.data.other_targets import OtherTargets, read_other_targets
from cluster.data.quarantine import Quarantine
from cluster.data.stream import Batch, Share
from cluster.storage import open_store
from tests.cluster.support.streaming import damage, expected, joined, make_latents, open_stream, order_of, read_all, same, stage_of
from tests.tiny import tiny

CLIPS = 12
LONELY, CORRUPT = 10, 4
"""A clip that nobody else is like, and one that is nobody's target."""


def matrix() -> np.ndarray:
    """Clips 0 to 2, 3 to 5, and so on act one script; the last three but one of them alone."""
    script = np.where(np.arange(CLIPS) == LONELY, 99, np.arange(CLIPS) // 3)
    rows = np.concatenate([script, 100 + script])
    return rows[:, None] == rows[None]


def others(probability: float, seed: int = 0) -> OtherTargets:
    return OtherTargets(matrix(), seed, probability, {"listener"}, [CORRUPT])


def test_a_target_is_of_somebody_appropriate_and_a_function_of_seed_and_position() -> None:
    items, positions = np.tile(np.arange(2 * CLIPS), 50), range(50 * 2 * CLIPS)
    found = others(0.25).of(items, positions)
    backwards = others(0.25).of(items[::-1], positions[::-1])[::-1]
    assert np.array_equal(found, backwards) and not np.array_equal(found, others(0.25, seed=1).of(items, positions))
    clips, sides = np.divmod(items, 2)
    whose, sides_of = np.divmod(found, 2)
    swapped = found != items
    assert np.array_equal(sides, sides_of) and matrix()[clips + CLIPS * sides, whose + CLIPS * sides].all()
    assert not (swapped & (clips == LONELY)).any() and not (swapped & (whose == CORRUPT)).any() and (clips == CORRUPT)[swapped].any()
    assert swapped[clips != LONELY].mean() == pytest.approx(0.25, abs=0.04)
    for clip in (0, 3):
        taken = set(whose[swapped & (clips == clip)].tolist())
        assert taken == {one for one in range(3 * (clip // 3), 3 * (clip // 3) + 3) if one not in (clip, CORRUPT)}, "each of them"


def test_nobody_s_target_is_another_s_at_0_and_everybody_s_at_1() -> None:
    items = np.arange(2 * CLIPS)
    assert np.array_equal(others(0).of(items, range(len(items))), items)
    assert (others(1).of(items, range(len(items))) == items).nonzero()[0].tolist() == [2 * LONELY, 2 * LONELY + 1]


def test_an_item_keeps_its_speaker_and_has_the_other_s_listener_on_any_number_of_ranks(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = make_latents(store, [5, 4, 3])
    total, chosen = 2 * CLIPS + 7, others(0.5)
    batches = read_all(store, Share(5, total, 1, 0), others=chosen)
    order, swapped = order_of(manifest), 0
    for batch in batches:
        assert batch.items == order.at(np.array(batch.positions)).tolist(), "order and exactly-once stay"
        donors = chosen.of(np.array(batch.items), batch.positions).tolist()
        for row, (item, donor, position) in enumerate(zip(batch.items, donors, batch.positions, strict=True)):
            own, given = expected(manifest, item, position), expected(manifest, donor, position)
            assert all(np.array_equal(batch.tensors[name][row], own[name]) for name in ("speaker", "noise", "times"))
            assert np.array_equal(batch.tensors["listener"][row], given["listener"])
            swapped += donor != item
    assert 5 < swapped < total - 5
    later = read_all(store, Share(5, total, 1, 0), first_step=3, others=chosen)
    assert len(later) == len(batches) - 3 and all(map(same, later, batches[3:])), "a resume reads the same"
    shares = [read_all(store, Share(5, total, 2, rank), others=chosen) for rank in (0, 1)]
    for whole, *parts in zip(batches, *shares, strict=True):
        assert sum(part.ledger for part in parts) == whole.ledger
        assert all(np.array_equal(tensor, whole.tensors[name]) for name, tensor in joined(parts).items())
    assert batches[0].ledger != read_all(store, Share(5, total, 1, 0))[0].ledger, "the ledger tells of it"


def test_a_damaged_target_is_quarantined_itself_and_takes_no_other_item_with_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    make_latents(store, [5, 4, 3])
    damage(store, 1, 2, "b.latent.npy")  # clip 7: side 0 has it as its target, side 1 as its speaker
    chosen, share = others(0.5), Share(5, 20 * 2 * CLIPS, 1, 0)

    def batches(first: int, quarantine: Quarantine) -> Iterator[Batch]:
        stream = open_stream(store, share, others=chosen, quarantine=quarantine)
        try:
            for batch in stream.batches(first):  # what the loop does with them
                quarantine.add(batch.corrupt)
                stream.mask(batch)
                yield batch
        finally:
            stream.close()

    known = Quarantine()
    found = list(batches(0, known))
    assert {bad.item for bad in known.entries} == {14, 15} and all(bad.why for bad in known.entries)
    borrowed = 0
    for batch in found:
        for row, (item, target, position) in enumerate(zip(batch.items, batch.targets, batch.positions, strict=True)):
            counts = not (known.holds(item, position) or known.holds(target, position))
            assert batch.tensors["weight"][row] == counts
            borrowed += not counts and item not in (14, 15)
    assert borrowed > 3
    for first in (3, 40):
        before = Quarantine(bad for bad in known.entries if bad.position < first * share.batch)
        assert all(map(same, batches(first, before), found[first:])), "a resume leaves out the same"


def test_a_stage_without_a_speaker_and_a_run_that_does_not_ask_have_their_own_targets(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = make_latents(store, [2])
    assert stage_of(load_manifest(store)).targets() == {"listener"}
    for setting, names in ((0, {"listener"}), (0.5, set[str]())):
        experiment = tiny(tmp_path, tmp_path, f"diffusion.other_target={setting}")
        assert read_other_targets(experiment, (store, manifest.hash), names, ()) is None
