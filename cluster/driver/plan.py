"""What a run would do, worked out without starting anything: data, steps, parameters, memory, shapes, cluster."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from rich.console import Group
from rich.table import Table

from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.driver.pin import Pinned, stage_end
from cluster.driver.ray_train import gang_of
from cluster.runtime.placement import Gang
from cluster.training.beside_steps import beside_steps, beside_steps_on_gpu
from cluster.training.memory import host_memory_per_rank, memory_per_rank, offloaded_per_rank
from cluster.training.rehearsal import rehearse
from cluster.training.settings import engine_settings, micro_batches
from reactdiff.clip import windows_of
from reactdiff.learning_rate import FLOOR
from reactdiff.model.shapes import parameters_by_module
from reactdiff.stage import Source, Stage, flops_per_item, shapes, stages_over, stored_batch


def gang_with_memory(experiment: Experiment, stage: str, kind: Stage) -> Gang:
    """The ranks of a stage, with the memory that each has to have on its machine: on GPUs, for what is offloaded alone."""
    gang, workers = gang_of(experiment.workers), experiment.workers
    if workers.gpu and workers.offload == "none":
        return gang
    with torch.device("meta"):
        sizes = [p.numel() for p in kind.module().parameters()]

    def memory(ranks: int) -> int:
        settings = engine_settings(experiment, stage, ranks)
        if workers.gpu:
            return host_memory_per_rank(sizes, settings, ranks)
        return sum(memory_per_rank(sum(sizes), settings, ranks).values())

    return replace(gang, memory=memory)


def plan(experiment: Experiment, pinned: Pinned) -> Group:
    """Everything --dry-run prints.

    Raises:
        ValueError: if the model does not fit the dataset (a missing stream, a width that does not divide).
    """
    clips = Source(pinned.manifest.stream_specs, pinned.manifest.frames)
    return Group(_data(experiment, pinned), *_stages(experiment, clips, pinned.manifest), _cluster(experiment))


def plan_without_data(experiment: Experiment, clips: Source) -> Group:
    """What can be said of a run before its dataset is there: all that does not depend on how many clips it has.

    Args:
        experiment: the configuration.
        clips: what the dataset is assumed to hold.

    Raises:
        ValueError: as `plan`.
    """
    return Group(*_stages(experiment, clips, None), _cluster(experiment))


def remarks(experiment: Experiment, manifest: Manifest) -> Iterator[str]:
    """What a run may do, and what few would want of it."""
    optim, most = experiment.optim, experiment.workers.most
    for name in _trained(experiment, Source(manifest.stream_specs, manifest.frames)):
        if most > (batch := optim.batch[name]):
            yield (
                f"of {most} ranks (workers.count) {most - batch} have nothing to do in stage {name}, whose steps have {batch} items: give "
                f"workers.count={batch}, or another run a larger optim.batch.{name}"
            )
        if 0 < (decay := optim.decay[name]) < 0.9 * (end := stage_end(experiment, name, manifest)):
            yield (
                f"stage {name} has {end:,} items, and from item {decay:,} on (optim.decay.{name}) the learning rate is {FLOOR:.0%} of "
                f"its peak: optim.decay.{name}={end} falls to the end, 0 not at all"
            )


def _data(experiment: Experiment, pinned: Pinned) -> Table:
    manifest = pinned.manifest
    table = Table(title=f"run {pinned.name} ({'new' if pinned.fresh else 'exists'}) in {pinned.store.url}", title_justify="left")
    for column in ("split", "clips", "items", "shards", "GB"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        clips = sum(split.shards.clips)
        table.add_row(name, f"{clips:,}", f"{2 * clips:,}", f"{len(split.shards):,}", f"{sum(split.shards.bytes) / 1e9:.3f}")
    table.caption = f"dataset {manifest.hash} at {experiment.data.url}, {manifest.frames} frames ({windows_of(manifest.frames)} windows)"
    return table


def _stages(experiment: Experiment, clips: Source, manifest: Manifest | None) -> list[Table]:
    kinds = stages_over(clips, experiment.model, experiment.diffusion)
    return [_stage(experiment, manifest, name, kinds) for name in _trained(experiment, clips)]


def _trained(experiment: Experiment, clips: Source) -> list[str]:
    """The stages that a run trains itself."""
    return list(stages_over(clips, experiment.model, experiment.diffusion))[bool(experiment.run.autoencoder) :]


def _stage(experiment: Experiment, manifest: Manifest | None, name: str, kinds: Mapping[str, Stage]) -> Table:
    kind = kinds[name]
    with torch.device("meta"):
        module = kind.module()
    parameters = sum(p.numel() for p in module.parameters())
    optim, workers = experiment.optim, experiment.workers
    batch = optim.batch[name]
    share = -(-batch // workers.most)
    parts = micro_batches(batch, workers.most, workers.micro_batch)
    table = Table(title=f"stage {name}", title_justify="left", show_header=False)
    for part, count in parameters_by_module(module):
        table.add_row(f"parameters of {part}", f"{count:,}")
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("operations / item", f"{flops_per_item(kind) / 1e9:,.1f} GFLOP, forward and backward")
    steps = f"{optim.epochs[name]:g} epochs x the dataset's items / {batch}"
    if manifest:
        items, end = 2 * int(manifest.counts(experiment.data.split).sum()), stage_end(experiment, name, manifest)
        steps = f"{optim.epochs[name]:g} epochs x {items:,} items / {batch} = {-(-end // batch):,}"
    table.add_row("steps", steps)
    falls = f", falls to {FLOOR:.0%} of it until item {optim.decay[name]:,}" if optim.decay[name] else ""
    rises = f"rises until item {optim.warmup[name]:,} to " if optim.warmup[name] else ""
    table.add_row("learning rate", f"{rises}{optim.lr[name]:g}{falls}")
    table.add_row("items / rank and step", f"{batch} / {workers.most} ranks = {share}, in {parts} micro-batch{'es' if parts > 1 else ''}")
    of_most, of_least = (engine_settings(experiment, name, ranks) for ranks in (workers.most, workers.least))
    most, least = memory_per_rank(parameters, of_most, workers.most), memory_per_rank(parameters, of_least, workers.least)
    few = f"{workers.least} ranks" if workers.least > 1 else f"1 rank, ZeRO-{of_least.zero}"
    for what in most:
        fewer = f" ({least[what] / 1e6:,.1f} MB with {few})" if least[what] != most[what] else ""
        table.add_row(f"{what} / rank (ZeRO-{of_most.zero}, {optim.precision})", f"{most[what] / 1e6:,.1f} MB{fewer}")
    for ranks in sorted({workers.least, workers.most}, reverse=True):
        for what, said in _most_memory(experiment, name, kinds, ranks):
            table.add_row(f"{what}{f', {ranks} ranks' if workers.least < workers.most else ''}", said)
    for tensor, shape in shapes(kind).items():
        whole = (-(-share // parts), *shape)
        table.add_row(f"tensor {tensor}", f"{whole} = {4 * prod(whole) / 1e6:,.1f} MB in fp32")
    return table


def _most_memory(experiment: Experiment, name: str, kinds: Mapping[str, Stage], ranks: int) -> Iterator[tuple[str, str]]:
    """The most that one of so many ranks holds while it trains, activations included."""
    gpu, settings, share = experiment.workers.gpu, engine_settings(experiment, name, ranks), -(-experiment.optim.batch[name] // ranks)
    held = rehearse(kinds[name], settings, ranks, -(-share // settings.micro_batches), gpu)
    with torch.device("meta"):
        sizes = {stage: [p.numel() for p in kind.module().parameters()] for stage, kind in kinds.items()}
    parameters = sum(sizes[name])
    arrays = [share * tensor.nbytes for tensor in stored_batch(kinds[name], 1, "meta").values()]
    beside = beside_steps(parameters, len(settings.kinds), ranks, arrays, int(1e6 * experiment.data.read_ahead), gpu)
    if gpu:
        beside["offloaded"] = host_memory_per_rank(sizes[name], settings, ranks)
    zero = f"ZeRO-{settings.zero}"
    if gpu:
        watched = name == list(kinds)[-1] and (experiment.evaluation.watch or experiment.evaluation.rungs)
        scored = sum(map(sum, sizes.values())) if watched else 0
        on_gpu = beside_steps_on_gpu(settings, sizes[name], ranks, sum(arrays), scored)
        yield f"most GPU memory / rank ({zero})", _sum({"tensors": held.living - offloaded_per_rank(parameters, settings, ranks), **on_gpu})
        yield "most host memory / rank", _sum(beside)
    else:
        yield f"most memory / rank ({zero})", _sum({"tensors": held.resident, **beside})


def _sum(sizes: Mapping[str, int]) -> str:
    """So many bytes in all, and of what."""
    return f"{sum(sizes.values()) / 1e9:.2f} GB = {' + '.join(f'{size / 1e9:.2f} {what}' for what, size in sizes.items() if size)}"


def _cluster(experiment: Experiment) -> Table:
    workers = experiment.workers
    table = Table(title="cluster", title_justify="left", show_header=False)
    fewest = f"{workers.least} to " if workers.least < workers.most else ""
    table.add_row("ranks", f"{fewest}{workers.most} x ({workers.cpus:g} CPU{', 1 GPU' if workers.gpu else ''}, {workers.threads} threads)")
    table.add_row("in all", f"{fewest and 'at most '}{workers.most * workers.cpus:g} CPUs, {workers.most if workers.gpu else 0} GPUs")
    return table
