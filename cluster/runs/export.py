"""Exports: the averaged weights of a finished stage as safetensors plus what is needed to build its module again.

`exports/<stage>/<hash>.safetensors` holds weights and buffers, `exports/<stage>/<progress>.json` the description; the
description is created last, so an export is whole or absent.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import nn

from cluster.config.schema import Experiment
from cluster.runs import checkpoint
from cluster.runs.averages import averaged_weights, marks, mixture_at
from cluster.runs.checkpoint import Checkpoint
from cluster.runtime.device import best_device
from cluster.storage import AlreadyExists, NotFound, Permanent, StorageError, Store, content_hash
from cluster.storage.hashing import HashMismatch, read_verified
from reactdiff.config import Diffusion, Model
from reactdiff.data.sample import StreamSpec
from reactdiff.generate import Reactor
from reactdiff.model.codec import Codec
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, Stage, build, stage

VERSION = 2


@dataclass(frozen=True)
class Export:
    """The description of one export; `hash` stands for its weights, `dataset` for the state of the data it was trained on."""

    stage: str
    progress: int
    hash: str
    dataset: str
    seed: int
    frames: int
    streams: list[dict[str, Any]]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    version: int = VERSION

    @property
    def weights(self) -> str:
        """The key of its weights."""
        return f"exports/{self.stage}/{self.hash}.safetensors"

    @property
    def kind(self) -> Stage:
        """The stage that was trained."""
        source = Source([StreamSpec(**spec) for spec in self.streams], self.frames)
        return stage(self.stage, Model.model_validate(self.model), Diffusion.model_validate(self.diffusion), source)

    def build(self) -> nn.Module:
        """The module of this export, in evaluation mode, its weights not yet loaded."""
        return build(self.kind, self.seed).eval()


class Checkpointed(NamedTuple):
    """What an export says of where its weights come from."""

    stage: str
    progress: int
    dataset: str


def write_export(store: Store, experiment: Experiment, name: str, source: Source, progress: int) -> Export:
    """Export the averaged weights of a stage's checkpoint at its end.

    Args:
        store: the run's folder.
        experiment: the run's configuration.
        name: the stage.
        source: streams and frames the stage was trained on.
        progress: where the stage ended.

    Raises:
        StorageError: if there is no whole checkpoint at that progress.
    """
    found = _checkpoint(store, name, progress)
    data = _averages(store, experiment, found, experiment.diffusion.ema_length)
    return _write(store, export_of(experiment, source, found, content_hash(data)), data)


def with_length(store: Store, experiment: Experiment, export: Export, length: float) -> Export:
    """The same export with averages of another relative length; 0: those of `optim.ema`.

    They are made once, and kept beside the export's own, since their last bits may be others on another machine.

    Raises:
        StorageError: if its checkpoint is not there any more.
        ValueError: as `averaged_weights`.
    """
    record = f"averages/{export.stage}/{export.progress:015d}-{length:g}.json"
    if not store.exists(record):
        data = _averages(store, experiment, _checkpoint(store, export.stage, export.progress), length)
        made = replace(export, hash=content_hash(data))
        store.put(made.weights, data)
        with suppress(AlreadyExists):
            store.create(record, json.dumps({"hash": made.hash}).encode())
    return replace(export, hash=json.loads(store.read(record))["hash"], diffusion=export.diffusion | {"ema_length": length})


def _checkpoint(store: Store, name: str, progress: int) -> Checkpoint:
    found = next((c for c in _manifests(store, name) if c.progress == progress), None)
    if found is None:
        where = f"{store.url}/checkpoints/{name}"
        raise StorageError(f"{where} has no whole checkpoint at progress {progress}, the end of the stage; run the command again")
    return found


def _averages(store: Store, experiment: Experiment, found: Checkpoint, length: float) -> bytes:
    if length and experiment.ema_every(found.stage):
        return save(averaged_weights(store, experiment, found, length))
    return save(checkpoint.assemble(store, found, "average"))


def write_untrained(store: Store, experiment: Experiment, name: str, source: Source, dataset: str) -> Export:
    """Export a stage in which there is nothing to train.

    Args:
        store: the run's folder.
        experiment: the run's configuration.
        name: the stage.
        source: streams and frames of its dataset.
        dataset: hash of that.
    """
    data = save(build(stage(name, experiment.model, experiment.diffusion, source), experiment.seed).state_dict())
    found = Checkpointed(name, 0, dataset)
    return _write(store, export_of(experiment, source, found, content_hash(data)), data)


def _write(store: Store, export: Export, data: bytes) -> Export:
    store.put(export.weights, data)
    _describe(store, export)
    return read_export(store, export.stage, export.progress)


def export_of(experiment: Experiment, source: Source, found: Checkpoint | Checkpointed, digest: str) -> Export:
    """The description of weights of this hash that were taken out of a checkpoint.

    Args:
        experiment: the run's configuration.
        source: streams and frames the stage was trained on.
        found: the checkpoint.
        digest: hash of the weights as safetensors.
    """
    return Export(
        stage=found.stage,
        progress=found.progress,
        hash=digest,
        dataset=found.dataset,
        seed=experiment.seed,
        frames=source.frames,
        streams=[asdict(spec) for spec in source.streams],
        model=experiment.model.model_dump(mode="json"),
        diffusion=experiment.diffusion.model_dump(mode="json"),
    )


def copy_export(export: Export, source: Store, store: Store) -> None:
    """Copy an export of another run, the description last.

    Raises:
        StorageError: if its weights are not those the description names.
    """
    if not store.exists(export.weights):
        store.put(export.weights, read_verified(source, export.weights, export.hash))
    _describe(store, export)


def _describe(store: Store, export: Export) -> None:
    try:
        store.create(f"exports/{export.stage}/{export.progress:015d}.json", json.dumps(asdict(export), indent=1).encode())
    except AlreadyExists:
        pass  # an earlier life wrote it; the one that is there counts


def read_export(store: Store, name: str, progress: int) -> Export:
    """The export of a stage at a progress.

    Raises:
        NotFound: if the stage has not ended there.
    """
    values = json.loads(store.read(f"exports/{name}/{progress:015d}.json"))
    if values["version"] != VERSION:
        raise Permanent(f"{store.url}/exports/{name}/{progress:015d}.json has version {values['version']}; this program reads {VERSION}")
    return Export(**values)


def newest_export(store: Store, name: str) -> Export:
    """The export of a stage with the most progress.

    Raises:
        NotFound: if the stage was never finished.
    """
    if not (there := _exported(store, name)):
        raise NotFound(f"{store.url} has no export of stage {name}: the run has not finished it; train it with jobs/train.py first")
    return read_export(store, name, there[-1])


def _exported(store: Store, name: str) -> list[int]:
    """Progress of each export of a stage."""
    keys = sorted(entry.key for entry in store.list(f"exports/{name}/") if entry.key.endswith(".json"))
    return [int(key.rsplit("/", 1)[-1].removesuffix(".json")) for key in keys]


def export_earlier(store: Store, experiment: Experiment, export: Export) -> None:
    """Export the stage as it was where `diffusion.weak_progress` asks for it, if that is a mark of `diffusion.ema_every` before the end.

    Raises:
        ValueError: if that is too early for averages as long as the run's own.
    """
    progress, batch = Diffusion.model_validate(export.diffusion).weak_progress, experiment.optim.batch[export.stage]
    kept = marks(experiment.ema_every(export.stage), batch, export.progress) - {export.progress}
    if progress not in kept or progress in _exported(store, export.stage):
        return
    if found := next((c for c in _manifests(store, export.stage) if (c.progress, c.dataset) == (progress, export.dataset)), None):
        if length := experiment.diffusion.ema_length:
            try:
                mixture_at(experiment, export.stage, progress, length)
            except ValueError as error:
                raise ValueError(
                    f"diffusion.weak_progress is {progress}, too early for averages as long as this run draws with, which are "
                    f"diffusion.ema_length={length:g} of what was trained: ask for a later one"
                ) from error
        data = _averages(store, experiment, found, length)
        alone = experiment.diffusion.model_copy(update={"autoguidance": 1.0, "weak_progress": 0}).model_dump(mode="json")
        _write(store, replace(export, progress=progress, hash=content_hash(data), diffusion=alone), data)


def weaker_export(store: Store, export: Export) -> Export | None:
    """The earlier export that `diffusion.autoguidance` asks for, if it does.

    Raises:
        NotFound: if it is not there, or of other latents; says which there are.
    """
    if not (progress := Diffusion.model_validate(export.diffusion).weak_progress):
        return None
    there = [read_export(store, export.stage, one) for one in _exported(store, export.stage) if one < export.progress]
    for weak in there:
        if weak.progress == progress and weak.dataset == export.dataset:
            return weak
    known = ", ".join(str(one.progress) for one in there if one.dataset == export.dataset) or "none"
    raise NotFound(
        f"diffusion.weak_progress is {progress}, but {store.url}/exports/{export.stage} has no such earlier export of these latents; "
        f"earlier ones are: {known}. A stage leaves one where it ends: train with a smaller optim.epochs first, then with the full one; "
        "or with diffusion.ema_every, where what the step that reaches a multiple of it left can be asked for"
    )


def load_export(store: Store, export: Export) -> nn.Module:
    """The module of an export with its weights, verified against the export's hash, on the GPU if there is one.

    Raises:
        StorageError: if the weights are not those the description names.
    """
    module = export.build()
    module.load_state_dict(load_weights(store, export), strict=True)
    return module.to(best_device())


def load_codec(store: Store, export: Export) -> Codec:
    """The same of stage 1."""
    codec = load_export(store, export)
    assert isinstance(codec, Codec)
    return codec


def load_reactor(store: Store, codec: Export, diffusion: Export | None) -> Reactor:
    """What generates reactions, of the exports of all stages its family has, and of the one that guides."""
    reactor = _reactor(load_export(store, codec), load_export(store, diffusion) if diffusion else None)
    if diffusion and reactor.diffusion and (weak := weaker_export(store, diffusion)):
        reactor.diffusion.weaker = (_diffusion(load_export(store, weak)),)
    return reactor


def untrained_reactor(codec: Export, diffusion: Export | None) -> Reactor:
    """The same with the weights that training began with."""
    return _reactor(codec.build().to(best_device()), diffusion.build().to(best_device()) if diffusion else None)


def _reactor(codec: nn.Module, diffusion: nn.Module | None) -> Reactor:
    assert isinstance(codec, Codec)
    return Reactor(codec, _diffusion(diffusion) if diffusion else None)


def _diffusion(module: nn.Module) -> LatentDiffusion:
    assert isinstance(module, LatentDiffusion)
    return module


def load_weights(store: Store, export: Export) -> dict[str, torch.Tensor]:
    """Weights and buffers of an export by name, verified."""
    try:
        return load(read_verified(store, export.weights, export.hash))
    except HashMismatch as error:
        raise Permanent(f"{error}: it is damaged; delete exports/{export.stage}/ and run the command again") from None


def _manifests(store: Store, name: str) -> list[Checkpoint]:
    """Those that can be read, newest first."""
    found = []
    for key in checkpoint.list_checkpoints(store, name):
        with suppress(checkpoint.DamagedCheckpoint):
            found.append(checkpoint.read_manifest(store, key))
    return found
