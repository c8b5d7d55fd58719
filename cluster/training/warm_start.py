"""Warm starts: what training starts from where `model.init_from` names other weights than the keyed initialisation.

A life that has a checkpoint goes on from that, whatever is here. Only weights are taken: the latents' range belongs to the
dataset of latents that the new run is trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.config.paths import absolute
from cluster.config.schema import Experiment
from cluster.runs.export import Export, load_weights
from cluster.runs.saved import SavedRun, open_run
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.init import Weights, initial_weights
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.pth import Pth, read_pth
from reactdiff.model.published import FILES, UNTRAINED, assert_authors, fill_autoencoder, fill_diffusion
from reactdiff.stage import Stage, build

SUFFIX = ".pth"
"""How the names of the authors' files end; anything else is a run."""


def check_warm_start(experiment: Experiment, kinds: Mapping[str, Stage]) -> list[str]:
    """Where each stage that is trained starts, a sentence each; empty where nothing is to be said.

    Args:
        experiment: its configuration.
        kinds: the stages by name.

    Raises:
        ValueError, StorageError: if a parent or file is missing or cannot be read, or its weights do not fit the model.
    """
    if (parent := _parent(experiment)) is None:
        return []
    with torch.device("meta"):
        return [parent.check(name, kinds[name].module()) for name in list(kinds)[bool(experiment.run.autoencoder) :]]


def first_weights(kind: Stage, stage: str, experiment: Experiment, log: Callable[[str], None]) -> Weights:
    """What the parameters of a stage begin with: what `model.init_from` names, or what is keyed by the seed.

    Args:
        kind: the stage.
        stage: its name, in `reactdiff.config.STAGES`.
        experiment: its configuration.
        log: told where weights are from that `model.init_from` names.

    Raises:
        ValueError: if the weights do not fit, naming the parameter and both shapes.
        StorageError: if the parent run has not finished the stage, or its weights are damaged.
    """
    if (parent := _parent(experiment)) is None:
        with torch.device("meta"):
            return initial_weights(kind.module(), experiment.seed)
    module = build(kind, experiment.seed)
    log(parent.fill(stage, module))
    return {name: parameter.detach() for name, parameter in module.named_parameters()}.__getitem__


def _parent(experiment: Experiment) -> "_ParentRun | _ParentFiles | None":
    """What `model.init_from` names, opened once."""
    names = experiment.model.init_from
    if not names:
        return None
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(names) > 1 and len(files) < len(names):
        raise ValueError(f"model.init_from is {list(names)}: give it one finished run (name, folder or URL), or the authors' files {FILES}")
    if not files:
        return _ParentRun(open_run(names[0], experiment.run.store), experiment.model.heads)
    assert_authors(experiment.model)
    return _ParentFiles([Path(absolute(name)) for name in names])


@dataclass(frozen=True)
class _ParentRun:
    """A run that was trained before."""

    run: SavedRun
    heads: int

    def check(self, stage: str, module: nn.Module) -> str:
        """Refuse weights that would not fit the module; returns where they are from, in a sentence."""
        export = self.run.export(stage)
        self._assert_fits(module, {name: value.shape for name, value in export.kind.module().state_dict().items()})
        if (theirs := export.model["heads"]) != self.heads:  # heads leave no trace in shapes, but other heads are another network
            raise ValueError(f"model.init_from: the parent's model.heads is {theirs}, but here it is {self.heads}; give it the parent's")
        return self._origin(stage, export)

    def fill(self, stage: str, module: nn.Module) -> str:
        """Give a module every parameter, and nothing else; returns where they are from, in a sentence."""
        export = self.run.export(stage)
        weights: dict[str, Tensor] = load_weights(self.run.store, export)
        self._assert_fits(module, {name: value.shape for name, value in weights.items()})
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        return self._origin(stage, export)

    def _origin(self, stage: str, export: Export) -> str:
        return f"stage {stage} starts from run {self.run.store.url} at progress {export.progress}, weights {export.hash}"

    def _assert_fits(self, module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse weights of other names or shapes than the module's parameters; buffers do not matter."""
        parameters, whose = dict(module.named_parameters()), f"run {self.run.store.url}"
        there = set(shapes) - {name for name, _ in module.named_buffers()}
        missing, unknown = sorted(set(parameters) - there), sorted(there - set(parameters))
        if missing or unknown:
            raise ValueError(
                f"model.init_from: the weights of {whose} do not fit this model: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}; give model.* the parent's family, streams and depths"
            )
        for name, parameter in parameters.items():
            if shapes[name] != parameter.shape:
                raise ValueError(
                    f"model.init_from: {name} of {whose} has shape {tuple(shapes[name])}, but here it is {tuple(parameter.shape)}; "
                    "give model.* and the dataset's streams the parent's widths"
                )


@dataclass(frozen=True)
class _ParentFiles:
    """The authors' files: stage 1, and where they are given stage 2 and the projector."""

    paths: list[Path]

    def check(self, stage: str, module: nn.Module) -> str:
        """As of a run; to fill a module without memory (device "meta") costs nothing."""
        return self.fill(stage, module)

    def fill(self, stage: str, module: nn.Module) -> str:
        """As of a run."""
        first, *more = self._files
        if isinstance(module, Autoencoder):
            fill_autoencoder(module, first)
        elif isinstance(module, LatentDiffusion) and more:
            fill_diffusion(module, more[0], more[1] if len(more) > 1 else None)
        own = self._files[:1] if stage == "autoencoder" else more
        if not own:
            return f"stage {stage} starts from its keyed initialisation: model.init_from has no STAGE2.pth"
        says = f"stage {stage} starts from the authors' {' and '.join(str(file.path) for file in own)}"
        return says if stage == "autoencoder" or len(own) == 2 else f"{says}. {UNTRAINED}"

    @cached_property
    def _files(self) -> list[Pth]:
        return [read_pth(path) for path in self.paths]
