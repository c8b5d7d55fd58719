"""What a step on tensors without memory says of a rank's memory, beside what ranks hold."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.bench.noise_dataset import make_noise
from cluster.bench.training import engine_step
from cluster.config.schema import Experiment
from cluster.training import loop
from cluster.training.beside_steps import BASE, beside_steps, beside_steps_on_gpu
from cluster.training.engine import Engine
from cluster.training.memory import host_memory_per_rank, offloaded_per_rank
from cluster.training.rehearsal import rehearse
from cluster.training.settings import EngineSettings, engine_settings
from reactdiff.clip import WINDOW
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import AUTHORS, AUTHORS_FRAMES, StreamSpec
from reactdiff.determinism import make_deterministic
from reactdiff.model.init import initial_weights
from reactdiff.stage import Source, Stage, build_without_memory, stages_over, stored_batch
from tests.cluster.support.ranks import on_ranks
from tests.cluster.support.training import parts, train_here
from tests.memory import kilobytes

SMALL = Model(facial=("au",), acoustic=("mfcc",), hidden=64, latent=16, channels=32, multipliers=(1, 1), condition=64)
CLIPS = Source((StreamSpec("au", "facial", 15), StreamSpec("mfcc", "acoustic", 26)), 100)
SETTINGS = EngineSettings(0, "fp32", 1, (0.9, 0.999), 5e-4, 0.0, 0.99, False, 0, "none", ())


@pytest.mark.starts  # DeepSpeed asks a compiler what it could compile
def test_items_cost_their_activations_far_less_where_they_are_computed_again_and_zero_1_divides_the_moments() -> None:
    kind, hook = stages_over(CLIPS, SMALL, Diffusion())["diffusion"], sys.excepthook
    parameters = sum(p.numel() for p in build_without_memory(kind).parameters())
    kept, again = (
        [rehearse(kind, replace(SETTINGS, recompute=recompute), 1, items).living for items in (8, 24)] for recompute in (False, True)
    )
    assert 20 * parameters < kept[0] < kept[1] < 20 * parameters + 4 * (kept[1] - kept[0])
    assert again[1] - again[0] < 0.6 * (kept[1] - kept[0])
    assert rehearse(kind, replace(SETTINGS, zero=1), 4, 8).living < kept[0] - 4 * parameters, "three quarters of the moments are elsewhere"
    assert not torch.distributed.is_initialized() and sys.excepthook is hook


@pytest.mark.starts  # DeepSpeed asks a compiler what it could compile
def test_on_a_gpu_weights_of_attention_are_not_kept_for_their_dropout() -> None:
    kind = stages_over(CLIPS, SMALL.model_copy(update={"dropout": 0.1}), Diffusion())["autoencoder"]
    with_dropout, without = (rehearse(kind, SETTINGS, 1, 8, gpu).living for gpu in (False, True))
    assert with_dropout - without > 4 * 8 * SMALL.heads * CLIPS.frames * WINDOW, "of each frame for each of its window, in fp32"


def test_a_gpu_holds_two_batches_a_second_bucket_and_a_copy_that_is_scored_and_the_host_pinned_powers_of_two() -> None:
    settings, sizes = replace(SETTINGS, zero=2, precision="bf16"), [3 * 1024, 5 * 1024]
    assert beside_steps_on_gpu(settings, sizes, 4, 700, 9) == {"buckets": 2 * 8 * 1024, "two batches": 1400, "copy that is scored": 36}
    assert beside_steps_on_gpu(replace(settings, zero=1), sizes, 4, 0, 0)["buckets"] == 4 * 8 * 1024
    assert beside_steps_on_gpu(settings, [10, 80 << 20], 4, 0, 0)["buckets"] == 2 * (2 * 80 - 50) * 1024**2
    assert beside_steps_on_gpu(settings, sizes, 1, 0, 0)["buckets"] == 0
    read = [beside_steps(1, 1, 1, [300, 1025], 1, gpu)["read ahead"] for gpu in (False, True)]
    assert read == [3 * (300 + 1025), 3 * (512 + 2048)]


def test_of_what_is_offloaded_gradients_and_weights_are_pinned_each_in_a_power_of_two_and_weights_twice() -> None:
    settings, sizes = replace(SETTINGS, zero=3, offload="optimizer"), [1600, 450]  # 1025 elements a rank of two
    unpinned = 4 * (1 + 2 + 1) * 1025  # fp32 masters, moments, averages
    assert offloaded_per_rank(sum(sizes), settings, 2) == unpinned + 2 * 4100
    assert host_memory_per_rank(sizes, settings, 2) == unpinned + 2 * 8192
    assert host_memory_per_rank(sizes, replace(settings, offload="all"), 2) == unpinned + 2 * 8192 + 8192 + 4096 + 1024
    assert host_memory_per_rank(sizes, replace(settings, offload="none"), 2) == 0


FACES = {"facial": ("au", "fer", "va"), "acoustic": ("w2v", "mfcc")}
FAITHFUL = {"prediction": "epsilon", "normalisation": "frame"}
CASES = [
    *[("autoencoder", 2, ranks, zero, False) for ranks, zero in ((1, 0), (2, 1), (2, 2), (2, 3))],
    ("autoencoder", 2, 1, 0, True),
    ("diffusion", 1, 1, 0, False),
]
"""Stage, items of a step, ranks, ZeRO stage, and whether activations are computed again."""


def faithful(name: str, batch: int, ranks: int, zero: int, again: bool) -> tuple[Stage, EngineSettings]:
    """A stage at the authors' widths."""
    experiment = Experiment.model_validate(
        {
            "model": FACES,
            "diffusion": FAITHFUL,
            "optim": {"batch": {"autoencoder": batch, "diffusion": batch}},
            "workers": {"count": ranks, "zero": zero, "recompute": again},
        }
    )
    return kind_of(experiment, name), engine_settings(experiment, name, ranks)


def kind_of(experiment: Experiment, name: str) -> Stage:
    """A stage over the authors' features."""
    return stages_over(Source(AUTHORS, AUTHORS_FRAMES), experiment.model, experiment.diffusion)[name]


def most_held(rank: int, ranks: int, name: str, batch: int, zero: int, again: bool) -> tuple[int, int]:
    """Kilobytes of this process before there is an engine, and at most once it has taken a step."""
    make_deterministic(threads=1)
    kind, settings = faithful(name, batch, ranks, zero, again)
    items = -(-batch // ranks)
    module, tensors = build_without_memory(kind), stored_batch(kind, items, "cpu")
    for tensor in tensors.values():
        tensor.fill_(1)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    engine = Engine(module, initial_weights(module, 0), settings, torch.device("cpu"))
    for _ in range(2):
        engine_step(engine, tensors, items, settings.micro_batches)()
    return before, kilobytes("VmHWM")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch", "ranks", "zero", "again"), CASES)
def test_a_rank_holds_what_the_plan_says_within_a_tenth_and_more_where_activations_are_computed_again(
    name: str, batch: int, ranks: int, zero: int, again: bool
) -> None:
    kind, settings = faithful(name, batch, ranks, zero, again)
    planned = rehearse(kind, settings, ranks, -(-batch // ranks)).resident
    found = on_ranks(ranks, most_held, name, batch, zero, again)
    print(f"\n{name}, {ranks} ranks, ZeRO-{zero}, {again=}: {planned / 1e9:.2f} GB planned, kB before and at most: {found}")
    for before, most in found:  # tensors that are computed again leave more holes: 16 to 25 % were seen
        assert 0.9 <= 1024 * most / (1024 * before + planned) <= (1.4 if again else 1.1)


def trained(rank: int, ranks: int, experiment: Experiment, folder: str) -> tuple[int, int]:
    """Kilobytes of this process before a run of stage 2, and at most until it has ended, with a checkpoint."""
    shape = AUTHORS_FRAMES, experiment.model.latent
    loop.read_range = lambda *_: (-torch.ones(shape), torch.ones(shape))  # noise comes without a range
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train_here(rank, ranks, experiment, folder, 1, "diffusion")
    return before, kilobytes("VmHWM")


LIMIT = 20e9


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(3600)
def test_the_faithful_stage_2_is_trained_and_kept_on_one_rank_within_20_gb(tmp_path: Path) -> None:
    """417 million parameters."""
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    if free < LIMIT:
        pytest.skip(f"{free / 1e9:.1f} GB of memory are available, of {LIMIT / 1e9:.0f}: end what holds the others")
    source = kind_of(Experiment(model=Model(**FACES)), "diffusion").source
    latents = make_noise(str(tmp_path / "noise"), source, 1, lambda done, total: None)
    experiment = Experiment.model_validate(
        {
            "data": {"url": latents, "read_ahead": 1},
            "model": FACES,
            "diffusion": FAITHFUL,
            "optim": {"batch": {"autoencoder": 1, "diffusion": 1}, "epochs": {"autoencoder": 1, "diffusion": 1 / 8}},
            "workers": {"count": 1},
        }
    )
    kind = kind_of(experiment, "diffusion")
    parameters = sum(p.numel() for p in build_without_memory(kind).parameters())
    settings = engine_settings(experiment, "diffusion", 1)
    held = rehearse(kind, settings, 1, 1).resident
    beside = beside_steps(parameters, len(settings.kinds), 1, [tensor.nbytes for tensor in stored_batch(kind, 1, "meta").values()], 1)
    ((before, most),) = on_ranks(1, trained, experiment, str(tmp_path / "run"))
    planned = held + sum(beside.values()) - BASE
    print(f"\n{parameters:,} parameters: {planned / 1e9:.2f} GB planned, kB before and at most: {before, most}")
    assert len(parts(tmp_path / "run", "diffusion")) == 1, "there is a checkpoint"
    assert 1024 * most < LIMIT and 1024 * most == pytest.approx(1024 * before + planned, rel=0.1)
