"""A run in its folder, opened for its results: configuration, dataset state, exports and models."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import yaml

from cluster.config.loading import ConfigError, build, changed
from cluster.config.paths import absolute
from cluster.config.schema import Experiment
from cluster.data.manifest import CURRENT, Manifest, load_manifest
from cluster.runs.export import Export, export_earlier, load_reactor, newest_export, weaker_export, with_length
from cluster.runs.latents import LatentDataset
from cluster.runs.state import read_state
from cluster.storage import NotFound, Store, open_store
from reactdiff.generate import Reactor
from reactdiff.stage import stages_of

SAMPLING = ("sampler", "sampling_steps", "guidance", "autoguidance", "weak_progress", "smoothing", "hidden_streams", "ema_length")
"""Fields of `diffusion` that training does not see: a finished run may be asked with others."""


@dataclass(frozen=True)
class SavedRun:
    """A run and what its stages have left so far.

    Attributes:
        experiment: its configuration.
        home: the store it lies in, with the latents of all runs.
        store: its folder, below `home`.
        dataset: the dataset it is trained on.
        clips: the state of the dataset it is pinned to.
        sampling: fields of `SAMPLING` that are other than the run was trained with.
    """

    experiment: Experiment
    home: Store
    store: Store
    dataset: Store
    clips: Manifest
    sampling: dict[str, Any] = field(default_factory=dict)

    def export(self, stage: str) -> Export:
        """The newest export of a stage.

        Raises:
            NotFound: if the run has not finished the stage.
        """
        return newest_export(self.store, stage)

    def latents(self) -> LatentDataset:
        """The finished autoencoder over the run's dataset.

        Raises:
            NotFound: if it is not finished.
        """
        data, export = self.experiment.data, self.export("autoencoder")
        return LatentDataset(export, self.store, self.dataset, self.clips.hash, self.home, data.split, data.on_corrupt)

    def diffusion(self) -> Export | None:
        """The finished diffusion, which draws latents of the autoencoder that `latents` decodes with; None in a family without one.

        Raises:
            NotFound: if it is not finished, or the export that is to guide it is not there.
            ValueError: if it was trained on another autoencoder's latents.
        """
        if "diffusion" not in stages_of(self.experiment.model):
            return None
        latents, export = self.latents(), self.export("diffusion")
        if latents.store.exists(CURRENT) and (made := latents.manifest().hash) != export.dataset:
            raise ValueError(
                f"the diffusion of {self.store.url} (progress {export.progress}) was trained on latents {export.dataset}, but its newest "
                f"autoencoder (progress {latents.export.progress}) made {made}: train the two in a run of another name (run.name)"
            )
        asked = replace(export, diffusion=export.diffusion | self.sampling)
        if "ema_length" in self.sampling:
            asked = with_length(self.store, self.experiment, asked, self.sampling["ema_length"])
        export_earlier(self.store, self.experiment, asked)
        weaker_export(self.store, asked)
        return asked

    def with_sampling(self, overrides: Sequence[str]) -> "SavedRun":
        """The run as it draws with other sampling, for example `diffusion.sampler=dpm++`.

        Raises:
            ConfigError: for any other key, or a value that the run cannot be asked with.
        """
        if overrides and "diffusion" not in stages_of(self.experiment.model):
            raise ConfigError(f"{overrides[0]}: model.family={self.experiment.model.family} samples no diffusion")
        keys = [f"diffusion.{name}" for name in SAMPLING]
        if other := [text for text in overrides if text.partition("=")[0] not in keys]:
            raise ConfigError(f"{other[0]}: a trained run can be asked with other {', '.join(keys)}, and nothing else")
        asked, trained = (one.diffusion.model_dump(mode="json") for one in (changed(self.experiment, overrides), self.experiment))
        return replace(self, sampling={name: asked[name] for name in SAMPLING if asked[name] != trained[name]})

    def model(self) -> Reactor:
        """What generates reactions: the averaged weights of all stages, in evaluation mode, on the GPU if there is one."""
        return load_reactor(self.store, self.latents().export, self.diffusion())


class RunFolder(NamedTuple):
    """A run's configuration, the store it lies in, and its folder there."""

    experiment: Experiment
    home: Store
    store: Store


def open_folder(run: str, store: str) -> RunFolder:
    """Open the folder of a run that was started before; its dataset need not be there.

    Args:
        run: its name, or its folder or URL, which ends in `runs/NAME` wherever the store is now.
        store: folder or URL of the store that a mere name is looked up in.

    Raises:
        ValueError: if there is no such run.
    """
    url = absolute(run if "/" in run else f"{store}/runs/{run}").rstrip("/")
    above, runs, name = url.rpartition("/runs/")
    if not runs or "/" in name:
        raise ValueError(f"{run!r} is no run: give its name, or its folder or URL, which ends in runs/NAME")
    home = open_store(above)
    folder = home.at(f"runs/{name}")
    try:
        tree = yaml.safe_load(folder.read("config.yaml"))
    except NotFound:
        raise ValueError(
            f"there is no run at {url} (no config.yaml): correct its name or --store, or train it: "
            f"python jobs/train.py --config FILE run.name={name} run.store={above}"
        ) from None
    experiment = build(tree, f"{url}/config.yaml")
    return RunFolder(experiment.model_copy(update={"run": experiment.run.model_copy(update={"name": name, "store": above})}), home, folder)


def open_run(run: str, store: str) -> SavedRun:
    """Open a run that was started before, with its dataset.

    Args:
        run: as `open_folder`.
        store: as `open_folder`.

    Raises:
        ValueError: if there is no such run, or its dataset is gone.
    """
    experiment, home, folder = open_folder(run, store)
    if (state := read_state(folder)) is None:
        raise ValueError(f"run {folder.url} ended before it began (no state.json): start it again with jobs/train.py")
    dataset = open_store(experiment.data.url)
    return SavedRun(experiment, home, folder, dataset, load_manifest(dataset, state.manifest))
