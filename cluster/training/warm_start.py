"""Warm starts: what training starts from where `model.init_from` names other weights than the keyed initialisation.

A life that has a checkpoint goes on from that, whatever is here. Only weights are taken: the latents' range belongs to the
dataset of latents that the new run is trained on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.config.paths import absolute
from cluster.config.schema import Experiment
from cluster.runs.export import Export, load_weights
from cluster.runs.saved import SavedRun, open_run
from reactdiff.model.authors import FILES, UNTRAINED, assert_authors, fill_autoencoder, fill_diffusion
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.pth import read_pth
from reactdiff.stage import Stage

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
    said: list[str] = []
    for name in list(kinds)[bool(experiment.run.autoencoder) :] if experiment.model.init_from else []:
        with torch.device("meta"):
            module = kinds[name].module()
            if _is_run(experiment):
                parent = _parent(experiment)
                _assert_fits(module, {key: value.shape for key, value in parent.export(name).kind.module().state_dict().items()}, parent)
                _assert_same_heads(experiment, parent.export(name))
                said.append(_origin(name, experiment))
            else:
                warm_start(module, name, experiment, said.append)
    return said


def warm_start(module: nn.Module, stage: str, experiment: Experiment, log: Callable[[str], None]) -> None:
    """Give a stage's module the weights that `model.init_from` names; without any, it is left as it is.

    Args:
        module: what `reactdiff.stage.build` made; its buffers stay as they are.
        stage: in `reactdiff.config.STAGES`.
        experiment: its configuration.
        log: told where the weights are from.

    Raises:
        ValueError: if the weights do not fit, naming the parameter and both shapes.
        StorageError: if the parent run has not finished the stage, or its weights are damaged.
    """
    if not (origin := _origin(stage, experiment)):
        return
    if _is_run(experiment):
        parent = _parent(experiment)
        weights = load_weights(parent.store, parent.export(stage))
        _copy(module, weights, parent)
    else:
        first, *more = (read_pth(path) for path in _files(experiment))
        if isinstance(module, Autoencoder):
            fill_autoencoder(module, first)
        elif isinstance(module, LatentDiffusion) and more:
            fill_diffusion(module, more[0], more[1] if len(more) > 1 else None)
    log(origin)


def _origin(stage: str, experiment: Experiment) -> str:
    """Where a stage's weights are from, in a sentence, after a look that they are there."""
    if not experiment.model.init_from:
        return ""
    if _is_run(experiment):
        parent = _parent(experiment)
        export = parent.export(stage)
        return f"stage {stage} starts from run {parent.store.url} at progress {export.progress}, weights {export.hash}"
    assert_authors(experiment.model)
    files = [read_pth(path).path for path in _files(experiment)]
    own = files[:1] if stage == "autoencoder" else files[1:]
    if not own:
        return f"stage {stage} starts from its keyed initialisation: model.init_from has no STAGE2.pth"
    says = f"stage {stage} starts from the authors' {' and '.join(map(str, own))}"
    return says if stage == "autoencoder" or len(own) == 2 else f"{says}. {UNTRAINED}"


def _is_run(experiment: Experiment) -> bool:
    names = experiment.model.init_from
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(names) > 1 and len(files) < len(names):
        raise ValueError(f"model.init_from is {list(names)}: give it one finished run (name, folder or URL), or the authors' files {FILES}")
    return not files


def _parent(experiment: Experiment) -> SavedRun:
    return open_run(experiment.model.init_from[0], experiment.run.store)


def _files(experiment: Experiment) -> list[Path]:
    return [Path(absolute(name)) for name in experiment.model.init_from]


def _copy(module: nn.Module, weights: dict[str, Tensor], parent: SavedRun) -> None:
    """Take every parameter, and nothing else, from exported weights."""
    _assert_fits(module, {name: value.shape for name, value in weights.items()}, parent)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def _assert_fits(module: nn.Module, shapes: Mapping[str, torch.Size], parent: SavedRun) -> None:
    """Refuse weights of other names or shapes than the module's parameters; buffers do not matter."""
    parameters, whose = dict(module.named_parameters()), f"run {parent.store.url}"
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


def _assert_same_heads(experiment: Experiment, parent: Export) -> None:
    """Heads leave no trace in shapes, but other heads are another network."""
    if (theirs := parent.model["heads"]) != (ours := experiment.model.heads):
        raise ValueError(f"model.init_from: the parent's model.heads is {theirs}, but here it is {ours}; give it the parent's")
